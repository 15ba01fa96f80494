"""Fills a database as if the service had been used for years, by copying a few rows inside the database."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import ColumnElement, String, Table, insert, literal, select, true, update
from sqlalchemy import cast as sql_cast

from catalog.lifecycle import recording
from catalog.tables.history import Attempt, JobEvent, MetricBlock
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, File
from tests.catalog.world import World

CHUNK = 50_000
"""Rows per statement."""
YEAR = 365 * 86_400.0
ONE_IN_TEN = 10


def fill(world: World, *, num_jobs: int, num_points: int) -> dict[str, str]:
    """Create `num_jobs` finished jobs with attempts, events, files and an equal part of the points.

    One job in ten has an adapter. Returns the ids of a job in the middle and of the last one.
    """
    world.worker()
    claim = world.running()
    points = [
        {"kind": "train", "step": step, "loss": 2 / step, "token_accuracy": 0.5, "learning_rate": 1e-4, "num_tokens": 9}
        for step in range(1, num_points // num_jobs + 1)
    ]
    recording.record_metrics(world.db, claim.claim_id, points)
    world.complete(claim.claim_id)
    ended = claim.job.id
    with world.db.write() as session:  # move them to the past
        for table in (Job, Adapter, File):
            session.execute(update(table).values(created_at=table.created_at - YEAR))
    for first in range(1, num_jobs + 1, CHUNK):
        last = min(first + CHUNK - 1, num_jobs)
        _copy(world, Job, first, last, Job.id == ended, id=Job.id, claim_id=Job.claim_id, adapter_name=Job.adapter_name)
        _copy(world, Attempt, first, last, Attempt.job_id == ended, claim_id=Attempt.claim_id, job_id=Attempt.job_id)
        _copy(world, JobEvent, first, last, JobEvent.job_id == ended, job_id=JobEvent.job_id)
        _copy(world, MetricBlock, first, last, MetricBlock.job_id == ended, job_id=MetricBlock.job_id)
        few = (first - 1) // ONE_IN_TEN + 1, last // ONE_IN_TEN
        _copy(world, File, *few, File.id == claim.job.training_file, id=File.id, digest=File.digest)
        keys = {"id": Adapter.id, "name": Adapter.name, "job_id": Adapter.job_id}
        _copy(world, Adapter, *few, Adapter.job_id == ended, **keys)
    with world.db.engine.connect() as connection:
        connection.exec_driver_sql("analyze")
        connection.commit()
    return {"job": f"{ended}-{num_jobs // 2}", "last": f"{ended}-{num_jobs}"}


def _copy(world: World, table: Any, first: int, last: int, of_one: ColumnElement[bool], **renamed: Any) -> None:
    """Copy the rows of one object with numbered ids. Each copy is created a second after the previous one."""
    if last < first:
        return
    numbers = select(literal(first).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < last))
    rows = cast(Table, table.__table__)
    copied: dict[str, Any] = {column.name: column for column in rows.c if column.name != "seq"}
    for name in renamed:
        copied[name] = rows.c[name] + "-" + sql_cast(numbers.c.n, String)
    if "created_at" in copied:
        copied["created_at"] = rows.c.created_at + numbers.c.n * 1.0
    if "counted_attempts" in copied:  # a job: its claim was released, so copies can't have distinct claim ids
        copied["claim_id"] = rows.c.claim_id
    found = select(*copied.values()).select_from(rows.join(numbers, true())).where(of_one)
    with world.db.write() as session:
        session.execute(insert(rows).from_select(list(copied), found))
