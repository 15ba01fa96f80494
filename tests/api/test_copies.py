"""`python -m api backup`, `restore` and `verify` as a person calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORRY_")}
    return subprocess.run(
        [sys.executable, "-m", "api", *arguments],
        env={**environment, "LORRY_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def service(tmp_path: Path) -> Path:
    assert run(tmp_path / "service", "bootstrap").returncode == 0
    return tmp_path / "service"


def test_a_service_is_copied_put_back_and_verified_by_three_commands(service: Path, tmp_path: Path) -> None:
    place, there = str(tmp_path / "backups"), tmp_path / "there"

    made = run(service, "backup", place, "--json")
    back = run(there, "restore", place)
    verified = run(there, "verify", "--json")

    assert (made.returncode, back.returncode, verified.returncode) == (0, 0, 0), made.stderr + back.stderr
    assert json.loads(made.stdout)["problems"] == []
    assert json.loads(made.stdout)["name"] in back.stdout
    assert json.loads(verified.stdout)["problems"] == []
    assert not (there / "pepper").exists()
    assert "LORRY_PEPPER" in back.stdout, "it is told that no key opens it yet"
    assert str(there / "pepper") in back.stdout


def test_what_is_wrong_is_told_and_ends_with_a_status(service: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "backups")
    run(service, "backup", place)

    again = run(service, "restore", place)
    nowhere = run(tmp_path / "there", "restore", str(tmp_path / "none"))
    never = run(service, "backup", place, "--keep", "0")

    assert again.returncode == nowhere.returncode == 1
    assert "already" in again.stderr
    assert "python -m api backup" in nowhere.stderr
    assert never.returncode == 2
    assert "at least 1" in never.stderr
    assert not any("Traceback" in done.stderr for done in (again, nowhere, never))


def test_the_pepper_is_in_no_backup(service: Path, tmp_path: Path) -> None:
    pepper = (service / "pepper").read_bytes()

    run(service, "backup", str(tmp_path / "backups"))

    copied = [path.read_bytes() for path in (tmp_path / "backups").rglob("*") if path.is_file()]
    assert copied
    assert not any(pepper in content or pepper.hex().encode() in content for content in copied)
