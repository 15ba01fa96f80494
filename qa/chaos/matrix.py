"""All rows, in the order in which they are run, and those that can't be."""

from __future__ import annotations

from qa.chaos.faults import api, clock, database, disk, job, memory, redis, restore, store, trainer, worker
from qa.chaos.scenario import NotHere, Row

ROWS: tuple[Row, ...] = (
    *worker.ROWS,
    *trainer.ROWS,
    *api.ROWS,
    *job.ROWS,
    *database.ROWS,
    *redis.ROWS,
    *store.ROWS,
    *disk.ROWS,
    *restore.ROWS,
    *memory.ROWS,
    *clock.ROWS,
)
NOT_HERE = (
    NotHere(
        name="cuda-oom",
        fault="CUDA out of memory",
        why="needs a CUDA GPU; the classes of exits are in tests/worker/process/test_exits.py",
    ),
    NotHere(
        name="database-read-only-sqlite",
        fault="SQLite's file read-only",
        why="root writes whatever the file's mode says",
    ),
)
