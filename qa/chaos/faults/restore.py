"""Faults that need a backup: the database is lost, with or without its machine, and restored from a backup that was
taken while a job trained."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from catalog.states import EndReason
from qa.chaos.scenario import SQLITE, Row
from qa.chaos.service import FaultSite


def _lost_and_restored(site: FaultSite) -> str:
    """Lose everything after a backup. The job continues from the checkpoint in the backup."""
    job_id, place = _train_past_a_backup(site)

    _lose_all(site)
    _command(site, "restore", str(place))

    return _finish_from_the_backup(site, job_id)


def _restored_next_to_log(site: FaultSite) -> str:
    """After a crash, the operator moves the database away and forgets the files that SQLite keeps next to it."""
    job_id, place = _train_past_a_backup(site)
    database = site.settings.data_dir / "lorry.db"
    left = [database.with_name(f"{database.name}{suffix}") for suffix in ("-wal", "-shm")]
    _crash(site, database, left)
    database.rename(site.folder / database.name)

    refused = site.start([sys.executable, "-m", "api", "restore", str(place)])
    assert refused.wait(site.patience_seconds) == 1, site.log()
    assert all(str(path) in site.log() for path in left), site.log()
    assert not database.exists(), "a database appeared next to the log of another"
    for path in left:
        path.rename(site.folder / path.name)
    _command(site, "restore", str(place))

    return f"refused, naming {' and '.join(path.name for path in left)}; {_finish_from_the_backup(site, job_id)}"


def _train_past_a_backup(site: FaultSite) -> tuple[str, Path]:
    """Train a job with a checkpoint at step 10 in the backup, and one at step 20 after it. Its worker is killed."""
    place = site.folder / "backups"
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    _command(site, "backup", str(place))
    site.gate("go").touch()
    site.wait_until(lambda: site.checkpoint_steps(job_id)[-1:] == [20])
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    return job_id, place


def _finish_from_the_backup(site: FaultSite, job_id: str) -> str:
    site.finish(job_id)

    (first, second) = site.attempts(job_id)
    assert [first.reason, second.reason] == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.attempts_text(job_id)
    assert second.resumed_from_step == 10, "the checkpoint of step 20 was made after the backup"
    _command(site, "verify")
    return site.attempts_text(job_id)


def _crash(site: FaultSite, database: Path, left: list[Path]) -> None:
    """Close this process's connection, and put back the files that the last connection deletes when it is closed."""
    kept = {path: path.read_bytes() for path in left}
    site.db.close()
    for path, content in kept.items():
        path.write_bytes(content)
    assert kept[left[0]], f"{left[0]} is empty: nothing would be replayed into {database}"


def _command(site: FaultSite, *arguments: str) -> None:
    command = site.start([sys.executable, "-m", "api", *arguments])
    assert command.wait(site.patience_seconds) == 0, site.log()


def _lose_all(site: FaultSite) -> None:
    """Delete the data folder, with the store, SQLite's file, base models and files of workers, and the content of
    PostgreSQL's database."""
    url = site.settings.resolved_database_url()
    site.db.close()
    shutil.rmtree(site.settings.data_dir)
    if not urlsplit(url).scheme.startswith("postgresql"):
        return
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("drop schema public cascade")
        connection.execute("create schema public")


ROWS = (
    Row(
        name="lost-and-restored",
        fault="database, store and all nodes are lost; a backup taken while the job trained is restored",
        also="the job continues from the backup's checkpoint",
        act=_lost_and_restored,
    ),
    Row(
        name="restored-next-to-log",
        fault="the database is lost in a crash, and SQLite's -wal and -shm files are left where it is restored",
        also="the restore is refused and names the files; once they are moved away, the job continues from the backup",
        act=_restored_next_to_log,
        databases=SQLITE,
    ),
)
