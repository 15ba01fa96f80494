"""The commands `python -m api backup`, `restore` and `verify`, run as child processes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from api.commands.bootstrap import open_existing
from catalog.audit import chain
from catalog.db.database import Database
from catalog.errors import InvalidRequest
from catalog.settings import Settings

ROOT = Path(__file__).parents[3]


def run(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORRY_")}
    return subprocess.run(
        [sys.executable, "-m", "api", *arguments],
        env={**environment, "LORRY_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.fixture
def service(tmp_path: Path) -> Path:
    assert run(tmp_path / "service", "bootstrap").returncode == 0
    return tmp_path / "service"


@pytest.mark.parametrize("has_url", [False, True])
def test_missing_database_error_names_the_setting_of_its_place(tmp_path: Path, *, has_url: bool) -> None:
    url = SecretStr(f"sqlite:///{tmp_path / 'lorry.db'}") if has_url else None

    with pytest.raises(InvalidRequest) as refusal:
        open_existing(Settings(data_dir=tmp_path, database_url=url))

    assert str(tmp_path / "lorry.db") in refusal.value.message
    assert refusal.value.remedy.startswith("Set LORRY_DATABASE_URL to" if has_url else "Set LORRY_DATA_DIR to")


def test_service_is_backed_up_restored_and_verified(service: Path, tmp_path: Path) -> None:
    place, there = str(tmp_path / "backups"), tmp_path / "there"

    made = run(service, "backup", place, "--json")
    back = run(there, "restore", place)
    verified = run(there, "verify", "--json")

    assert (made.returncode, back.returncode, verified.returncode) == (0, 0, 0), made.stderr + back.stderr
    assert json.loads(made.stdout)["problems"] == []
    assert json.loads(made.stdout)["name"] in back.stdout
    assert json.loads(verified.stdout)["problems"] == []
    assert not json.loads(verified.stdout)["audit_chain_verified"]
    assert not (there / "pepper").exists()
    assert "LORRY_PEPPER" in back.stdout, "restore must warn that no key is valid without the pepper"
    assert str(there / "pepper") in back.stdout


def test_errors_are_reported_with_an_exit_status(service: Path, tmp_path: Path) -> None:
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


def test_backups_do_not_contain_the_pepper(service: Path, tmp_path: Path) -> None:
    pepper = (service / "pepper").read_bytes()

    run(service, "backup", str(tmp_path / "backups"))

    copied = [path.read_bytes() for path in (tmp_path / "backups").rglob("*") if path.is_file()]
    assert copied
    assert not any(pepper in content or pepper.hex().encode() in content for content in copied)


def overwrite_page(path: Path, number: int) -> None:
    """Overwrite a page with 0xff. Pages are numbered from 1, and page 1 contains the file header."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with path.open("rb+") as file:
        file.seek((number - 1) * page_bytes)
        file.write(b"\xff" * page_bytes)


def root_page(path: Path, table: str) -> int:
    with sqlite3.connect(path) as connection:
        (page,) = connection.execute("select rootpage from sqlite_master where name = ?", [table]).fetchone()
    connection.close()
    return page


def test_verify_reports_a_damaged_page_and_exits_with_1(service: Path) -> None:
    overwrite_page(service / "lorry.db", root_page(service / "lorry.db", "organizations"))

    verified = run(service, "verify")

    assert verified.returncode == 1
    assert "The database is damaged:" in verified.stdout
    assert "Traceback" not in verified.stderr


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("command", [["verify"], ["backup", "backups"], ["serve", "--port", "0"]])
def test_corrupt_database_file_is_reported_with_the_remedy(service: Path, command: list[str]) -> None:
    overwrite_page(service / "lorry.db", 1)

    done = run(service, *command)

    assert done.returncode == 1
    assert f"{service / 'lorry.db'} is damaged: file is not a database." in done.stderr
    assert "python -m api restore" in done.stderr
    assert "Traceback" not in done.stderr


def test_restore_names_leftover_wal_files_and_succeeds_without_them(service: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "backups")
    run(service, "backup", place)
    (service / "lorry.db").unlink()
    (service / "lorry.db-wal").write_bytes(b"log of the lost database")
    (service / "lorry.db-shm").write_bytes(b"its index")

    refused = run(service, "restore", place)
    for suffix in ("-wal", "-shm"):
        (service / f"lorry.db{suffix}").rename(tmp_path / f"moved{suffix}")
    restored = run(service, "restore", place)

    assert refused.returncode == 1
    assert str(service / "lorry.db-wal") in refused.stderr
    assert str(service / "lorry.db-shm") in refused.stderr
    assert "Traceback" not in refused.stderr
    assert restored.returncode == 0, restored.stderr
    assert "no problems" in restored.stdout


def test_exported_audit_log_is_verified_with_only_the_pepper(service: Path, tmp_path: Path) -> None:
    db, pepper = Database(f"sqlite:///{service / 'lorry.db'}"), (service / "pepper").read_bytes()
    chain.seal(db, pepper=pepper)
    lines = [json.dumps(event) for event in chain.lines(db)]
    db.close()
    whole, edited, odd, cut, binary = (
        tmp_path / f"{name}.jsonl" for name in ("whole", "edited", "odd", "cut", "binary")
    )
    whole.write_text("\n".join(lines))
    edited.write_text("\n".join(lines).replace("first operator key", "mine"))
    odd.write_text("[]\n")
    cut.write_text(f"{lines[0]}\n{lines[1][:-5]}")
    binary.write_bytes(b"\xff\n")
    there = tmp_path / "there"

    without = run(there, "verify-export", str(whole))
    there.mkdir()
    (there / "pepper").write_bytes(pepper)
    good, bad, no_export, cut_off, no_text = (
        run(there, "verify-export", str(path)) for path in (whole, edited, odd, cut, binary)
    )

    assert (without.returncode, f"{there / 'pepper'} does not exist" in without.stderr) == (1, True)
    assert (good.returncode, f"{len(lines)} audit events, no problems" in good.stdout) == (0, True), good.stderr
    assert (bad.returncode, "changed" in bad.stdout) == (1, True)
    assert (no_export.returncode, "is not an audit event" in no_export.stderr) == (1, True)
    assert (cut_off.returncode, f"Line 2 of {cut} is not valid JSON (column " in cut_off.stderr) == (1, True)
    assert (no_text.returncode, f"{binary} is not a UTF-8 text file." in no_text.stderr) == (1, True)
    missing = run(there, "verify-export", str(tmp_path / "none"))
    assert (missing.returncode, "can't be read: No such file or directory." in missing.stderr) == (1, True)
