"""Writes the result file of a job: its curves as a CSV file with OpenAI's columns.

A worker writes and stores the content. The file's row is created in the transaction in which the job succeeds.
"""

from __future__ import annotations

import csv
import heapq
import itertools
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from sqlalchemy.orm import Session

from catalog.db.database import Database
from catalog.disk import full_disk_named
from catalog.history import metric_store
from catalog.storage.store import ArtifactStore, Blob
from catalog.tables.jobs import Job
from catalog.tables.storage import File
from catalog.tables.table import new_id

PURPOSE = "fine-tune-results"
"""OpenAI's purpose for files that the service creates."""
NAME = "step_metrics.csv"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
NOT_MEASURED = (None, None)
Point = tuple[int, str, float, float | None]
"""Step, kind, loss, token accuracy."""


def store_curves(db: Database, store: ArtifactStore, *, job_id: str, path: Path) -> Blob:
    """Write the job's curves to `path`, and store the file. Raises OutOfSpace, Unavailable."""
    write(db, job_id, path)
    return store.put_file(path)


def write(db: Database, job_id: str, path: Path) -> None:
    with full_disk_named(), path.open("w", newline="", encoding="ascii") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(lines(db, job_id))


def lines(db: Database, job_id: str) -> Iterator[tuple[float | None, ...]]:
    """Yield one line for each step with a measurement. Missing values are None."""
    points = heapq.merge(_curve(db, job_id, "train"), _curve(db, job_id, "valid"))
    for step, at_step in itertools.groupby(points, key=itemgetter(0)):
        measured = {kind: (loss, accuracy) for _, kind, loss, accuracy in at_step}
        yield (step, *measured.get("train", NOT_MEASURED), *measured.get("valid", NOT_MEASURED))


def record(session: Session, job: Job, content: Blob, *, now: float) -> File:
    """Create the file's row in the job's project, and set its id on the job."""
    file = File(
        id=new_id("file"),
        project_id=job.project_id,
        purpose=PURPOSE,
        filename=NAME,
        num_bytes=content.num_bytes,
        num_rows=None,
        kind=None,
        digest=content.digest,
        created_at=now,
    )
    session.add(file)
    job.result_file = file.id
    return file


def _curve(db: Database, job_id: str, kind: str) -> Iterator[Point]:
    """Yield points by step, in several transactions. The points can't change meanwhile: only the caller writes them."""
    last_step = -1
    while True:
        with db.read() as session:
            points = metric_store.some(session, job_id, kind, after_step=last_step)
        if not points:
            return
        yield from ((point.step, kind, point.loss, point.token_accuracy) for point in points)
        last_step = points[-1].step
