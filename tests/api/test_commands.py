"""The service's commands as processes: first start, serving, and prompt shutdown."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from catalog.db import revisions
from catalog.db.database import Database
from tests.next_migration import LATER, UNRELEASED

ROOT = Path(__file__).parents[2]
OLDER = revisions.newest()
"""The older revision, once the migration of tests/next_migration.py exists."""
WITH_SCRIPTS = """
import sys
from pathlib import Path
from catalog.db import revisions
revisions.SCRIPTS = Path(sys.argv.pop(1))
from api.__main__ import main
sys.exit(main())
"""
"""The same program with the migration scripts of the directory that its first argument names."""


def command(scripts: Path | None, *arguments: str) -> list[str]:
    program = ["-m", "api"] if scripts is None else ["-c", WITH_SCRIPTS, str(scripts)]
    return [sys.executable, *program, *arguments]


def run(
    data_dir: Path,
    *arguments: str,
    check: bool = True,
    umask: int = -1,
    scripts: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(scripts, *arguments),
        env={**os.environ, "LORRY_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=check,
        umask=umask,
    )


@contextmanager
def serving(data_dir: Path, *, scripts: Path | None = None) -> Generator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the API server. Yields its process, which the caller may stop, and its ready message."""
    with subprocess.Popen(
        command(scripts, "serve", "--port", "0"),
        env={**os.environ, "LORRY_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        yield child, json.loads(child.stdout.readline())


def bootstrapped(data_dir: Path) -> dict[str, Any]:
    return json.loads(run(data_dir, "bootstrap", "--json").stdout)


def test_only_the_first_start_creates_a_key(tmp_path: Path) -> None:
    first = bootstrapped(tmp_path)
    again = bootstrapped(tmp_path)

    assert first["created"] is True
    assert re.fullmatch(r"lorry_key-[0-9a-f]{24}_[\w-]{43}", first["api_key"])
    assert again == {"created": False, "api_key": None}
    assert (tmp_path / "pepper").stat().st_mode & 0o077 == 0
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} <= {"lorry.db", "pepper"}


def test_variables_without_a_meaning_are_reported(tmp_path: Path) -> None:
    as_json = json.loads(run(tmp_path, "bootstrap", "--json", LORRY_DATABASE="x").stdout)
    as_text = run(tmp_path, "bootstrap", LORRY_DATABASE="x")

    warning = "LORRY_DATABASE is not a setting of this version of Lorry, so it has no effect. "
    assert as_json["warnings"] == [f"{warning}Did you mean LORRY_DATABASE_URL?"]
    assert f"WARNING lorry.api {warning}" in as_text.stderr


def test_concurrent_first_starts_create_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda _: bootstrapped(tmp_path), range(3)))

    assert sorted(result["created"] for result in results) == [False, False, True]


def test_sign_in_link_uses_the_address_in_connection_json(tmp_path: Path) -> None:
    bootstrapped(tmp_path)
    (tmp_path / "connection.json").write_text(json.dumps({"url": "http://127.0.0.1:4321", "api_key": "x"}))

    noted = json.loads(run(tmp_path, "sign-in-link", "--json").stdout)["url"]
    named = run(tmp_path, "sign-in-link", "--url", "https://lorry.example.com/").stdout

    assert noted.startswith("http://127.0.0.1:4321/dashboard/#/sign-in/")
    assert named.startswith("https://lorry.example.com/dashboard/#/sign-in/")


def test_sign_in_link_before_the_first_start_fails_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(tmp_path / "none", "sign-in-link")

    assert not (tmp_path / "none").exists()

    assert failed.value.returncode == 1
    assert "Traceback" not in failed.value.stderr
    assert "python -m api bootstrap" in failed.value.stderr


def tables_of(data_dir: Path, revision: str) -> None:
    """Create the tables of another version of the service."""
    db = Database(f"sqlite:///{data_dir / 'lorry.db'}")
    if revision == OLDER:
        db.migrate(revision)
    else:
        db.migrate()
        with db.write() as session:
            session.execute(update(revisions.VERSIONS).values(version_num=revision))
    db.close()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["serve", "--port", "0"], "Run `python -m api bootstrap` from this version"),
        (["new-key"], "Run `python -m api bootstrap` from this version"),
        (["backup", "copies"], "Run this command with the Lorry version that the service runs"),
        (["verify"], "Run this command with the Lorry version that the service runs"),
    ],
)
def test_commands_on_older_tables_fail_with_the_remedy(
    tmp_path: Path, arguments: list[str], remedy: str, next_migration: Path
) -> None:
    tables_of(tmp_path, OLDER)

    failed = run(tmp_path, *arguments, check=False, scripts=next_migration)

    assert failed.returncode == 1
    assert f"is at revision {OLDER}, which is older." in failed.stderr
    assert remedy in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


@pytest.mark.parametrize(
    ("revision", "arguments", "parts"),
    [
        *(
            (UNRELEASED, arguments, [f"The database (revision {UNRELEASED})", "to an empty database"])
            for arguments in ("bootstrap", "serve --port 0", "new-key", "backup copies", "verify")
        ),
        (
            LATER,
            "bootstrap",
            [f"at revision {LATER}, which belongs to a newer version", f"only up to {OLDER}.", "or a later one"],
        ),
    ],
)
def test_commands_on_tables_of_another_build_fail_with_the_remedy(
    tmp_path: Path, revision: str, arguments: str, parts: list[str]
) -> None:
    tables_of(tmp_path, revision)

    failed = run(tmp_path, *arguments.split(), check=False)

    assert (failed.returncode, failed.stdout) == (1, "")
    assert all(part in failed.stderr for part in parts), failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("later", [True, False], ids=["tables of a later version", "tables that were migrated"])
def test_server_starts_on_migrated_and_on_newer_tables(tmp_path: Path, next_migration: Path, *, later: bool) -> None:
    tables_of(tmp_path, LATER if later else OLDER)
    if not later:
        run(tmp_path, "bootstrap", scripts=next_migration)

    with serving(tmp_path, scripts=next_migration) as (child, ready):
        status = httpx.get(f"{ready['url']}/readyz", trust_env=False, timeout=20).status_code
        child.send_signal(signal.SIGTERM)

    assert (status, child.returncode) == (200, 0)


def test_server_prints_its_address_and_stops_cleanly_with_open_streams(tmp_path: Path) -> None:
    key = bootstrapped(tmp_path)["api_key"]
    with serving(tmp_path) as (child, ready):
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=ready["url"], headers=headers, trust_env=False, timeout=20) as http,
            http.stream("GET", "/v1/queue/stream") as stream,
        ):
            lines = stream.iter_lines()
            first = next(lines)
            child.send_signal(signal.SIGTERM)
            rest = list(lines)
        _, log = child.communicate(timeout=30)

    assert ready["event"] == "ready"
    assert first == "event: queue"
    assert rest
    assert child.returncode == 0
    assert key not in log
    assert "path=/v1/queue/stream status=200" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("pepper", "problem"),
    [
        ("", "is empty"),
        ("x", "is 1, but"),
        ("x" * 31, "is 31, but"),
        (f"{'x' * 40}\n", "ends with whitespace"),
        (f" {'x' * 40}", "begins with whitespace"),
    ],
    ids=["empty", "one", "short", "with a newline", "with a space"],
)
def test_weak_pepper_is_rejected(tmp_path: Path, pepper: str, problem: str) -> None:
    done = run(tmp_path, "bootstrap", check=False, LORRY_PEPPER=pepper)

    assert done.returncode == 1
    assert f"LORRY_PEPPER {problem}" in done.stderr
    assert ("Remove the whitespace" if "whitespace" in problem else "openssl rand -hex 32") in done.stderr
    assert "Traceback" not in done.stderr
    assert "xxx" not in done.stderr


@pytest.mark.parametrize("command", [["bootstrap"], ["serve", "--port", "0"], ["new-key"], ["sign-in-link"]])
def test_lost_pepper_is_not_replaced_while_keys_exist(tmp_path: Path, command: list[str]) -> None:
    bootstrapped(tmp_path)
    (tmp_path / "pepper").unlink()

    done = run(tmp_path, *command, check=False)

    assert done.returncode == 1
    assert str(tmp_path / "pepper") in done.stderr
    assert "LORRY_PEPPER" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pepper").exists()


def test_new_pepper_and_new_key_restore_access_after_pepper_loss(tmp_path: Path) -> None:
    bootstrapped(tmp_path)
    (tmp_path / "pepper").unlink()

    made = run(tmp_path, "new-key", "--json", LORRY_PEPPER="a new pepper of at least 32 bytes")

    assert json.loads(made.stdout)["api_key"].startswith("lorry_key-")


def test_first_start_creates_files_that_other_users_cannot_read(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"

    run(data_dir, "bootstrap", umask=0o022)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (data_dir, *data_dir.rglob("*"))}
    assert {"data", "lorry.db", "pepper"} <= modes.keys()
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.parametrize(("mode", "warns"), [(0o755, True), (0o700, False)])
def test_data_directory_readable_by_others_is_reported(tmp_path: Path, mode: int, *, warns: bool) -> None:
    tmp_path.chmod(mode)

    done = run(tmp_path, "bootstrap", "--json")

    assert ("Other users of this machine can read" in done.stderr) is warns
    assert (f"chmod -R go-rwx {tmp_path}" in done.stderr) is warns
    assert json.loads(done.stdout)["created"] is True


def test_command_with_an_invalid_setting_prints_one_sentence(tmp_path: Path) -> None:
    failed = run(tmp_path, "bootstrap", check=False, LORRY_LEASE_SECONDS="soon")

    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        "LORRY_LEASE_SECONDS is invalid. Input should be a valid number, unable to parse string as a number. "
        "Correct these environment variables, and start again.\n"
    )


def test_start_without_a_database_has_a_remedy_for_operators(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", check=False, LORRY_DATABASE_URL="postgresql://lorry@127.0.0.1:1/lorry")

    assert done.returncode == 1
    assert done.stderr == (
        "The database is not responding. Start the database, or correct LORRY_DATABASE_URL. Then repeat this command.\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which even root can create nothing")
@pytest.mark.parametrize("data_dir", ["/sys/lorry", "/sys/lorry/data", None])
def test_folder_that_the_user_cannot_access_is_named_with_its_variable(tmp_path: Path, data_dir: str | None) -> None:
    if data_dir is None:
        done = run(tmp_path, "bootstrap", check=False, LORRY_DATABASE_URL="sqlite:////sys/lorry/lorry.db")
    else:
        done = run(Path(data_dir), "bootstrap", check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(f"The user with ID {os.geteuid()} can't access /sys/lorry: ")
    assert "Give that user access to it" in done.stderr
    assert ("or set LORRY_DATA_DIR to another folder" in done.stderr) is (data_dir is not None)
