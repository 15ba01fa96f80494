"""The machine with database and store is lost, and all comes from a backup that was taken while a job trained."""

from __future__ import annotations

import shutil
import signal
import sys
from urllib.parse import urlsplit

import psycopg

from catalog.states import EndReason
from tests.faults.row import Row
from tests.faults.site import FaultSite


def _lost_and_restored(site: FaultSite) -> str:
    """What the job did after the backup is lost with the rest. It goes on from the checkpoint that the backup has."""
    place = site.folder / "backups"
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    _command(site, "backup", str(place))
    site.gate("go").touch()
    site.wait_until(lambda: site.checkpoint_steps(job_id)[-1:] == [20])
    worker.send_signal(signal.SIGKILL)
    worker.wait()

    _lose_all(site)
    _command(site, "restore", str(place))
    site.finish(job_id)

    (first, second) = site.attempts(job_id)
    assert [first.reason, second.reason] == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.told(job_id)
    assert second.resumed_from_step == 10, "the checkpoint of step 20 was made after the backup"
    _command(site, "verify")
    return site.told(job_id)


def _command(site: FaultSite, *arguments: str) -> None:
    command = site.start([sys.executable, "-m", "api", *arguments])
    assert command.wait(site.patience_seconds) == 0, site.log()


def _lose_all(site: FaultSite) -> None:
    """The data folder: the store, SQLite's file, bases, what a worker left; and what is in PostgreSQL's database."""
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
        also="the job goes on from the backup's checkpoint",
        act=_lost_and_restored,
    ),
)
