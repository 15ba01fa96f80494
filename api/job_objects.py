"""Builds job responses with related data of other tables, in one query of each kind for any number of jobs."""

from __future__ import annotations

from collections.abc import Sequence

from api.schemas.jobs import FineTuningJob, job_object
from catalog.caller import Caller
from catalog.db.database import Database
from catalog.history import queries
from catalog.registry import adapters
from catalog.sweeps import queries as sweep_queries
from catalog.tables.jobs import Job
from catalog.tenancy import organizations


def job_objects(db: Database, rows: Sequence[Job], *, caller: Caller | None = None) -> list[FineTuningJob]:
    """Return the responses in the order of `rows`.

    The organization of `caller`'s own project is known from `caller`, so it is not read from the database.
    """
    adapter_ids = adapters.ids_by_job(db, [row.id for row in rows if row.adapter_name])
    seconds = queries.seconds_running(db, [row.id for row in rows if row.attempt])
    owners = {caller.project_id: caller.organization_id} if caller else {}
    if others := {row.project_id for row in rows} - owners.keys():
        owners |= organizations.ids_by_project(db, others)
    trials = sweep_queries.trials_by_job(db, [row.id for row in rows if row.sweep_id])
    return [
        job_object(
            row,
            organization_id=owners[row.project_id],
            adapter_id=adapter_ids.get(row.id),
            seconds_running=seconds.get(row.id, 0.0),
            trial=trials.get(row.id),
        )
        for row in rows
    ]
