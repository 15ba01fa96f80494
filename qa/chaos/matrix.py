"""All rows in the order in which they run, and the rows that can't run here."""

from __future__ import annotations

from qa.chaos.faults import (
    api,
    clock,
    database,
    disk,
    inference,
    job,
    memory,
    redis,
    restore,
    serving,
    store,
    trainer,
    worker,
)
from qa.chaos.scenario import NotHere, Row

ROWS: tuple[Row, ...] = (
    *worker.ROWS,
    *trainer.ROWS,
    *api.ROWS,
    *job.ROWS,
    *inference.ROWS,
    *serving.ROWS,
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
        why="needs a CUDA GPU; tests/worker/process/test_exits.py covers the classification of exits",
    ),
    NotHere(
        name="database-read-only-sqlite",
        fault="SQLite's file read-only",
        why="root can write regardless of the file's mode",
    ),
)
