"""Computes the inputs of plans: the tokenized files with details, and how many rows both files share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from secrets import token_hex

from catalog.disk import full_disk_named
from catalog.errors import OutOfSpace, Unavailable
from catalog.lifecycle.preparation import RETRY_SECONDS, FilesToPrepare
from catalog.plans import claims
from catalog.storage import token_cache
from catalog.storage.manifest import DamagedArtifact
from catalog.tables.storage import Prepared
from catalog.tables.table import Json
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim
from worker.background import child_task
from worker.background.child_task import Abandoned, ChildFailed
from worker.background.tokenization import (
    POSSIBLE_NODE_ERRORS,
    FileRefused,
    PreparationDelayed,
    crashed,
    error_of_attempt,
    prepare_files,
    stuck,
)
from worker.context.context import WorkerContext
from worker.node import scratch_dirs
from worker.process import sandbox

log = logging.getLogger(__name__)


def compute(context: WorkerContext, task: TaskClaim) -> bool:
    """Compute a plan. Raises StaleClaim, PreparationDelayed."""
    files = claims.begin(context.db, task)
    if files is None:
        return True
    try:
        with full_disk_named():
            _prepare(context, files, child_task.lost_lease(context, task))
        claims.conclude(context.db, task, settings=context.settings)
    except FileRefused:  # the plan shows the refusal in the file's report
        claims.conclude(context.db, task, settings=context.settings)
    except POSSIBLE_NODE_ERRORS as error:
        log.warning("%s", error)
        claims.fail(context.db, task, error=error_of_attempt(error))
        raise PreparationDelayed from error
    except Abandoned:
        task_queue.release(context.db, task)
    except (OutOfSpace, Unavailable) as error:
        log.warning("%s", error)
        task_queue.release(context.db, task, wait_seconds=RETRY_SECONDS)
        if isinstance(error, OutOfSpace):
            raise PreparationDelayed from error
    return True


def _prepare(context: WorkerContext, files: FilesToPrepare, is_unwanted: Callable[[], bool]) -> None:
    """Record the tokens of both files, and their overlap. Raises the errors of `prepare_files`."""
    train, valid = prepare_files(context, files, is_unwanted=is_unwanted)
    if valid is None:
        return
    keys = {"train_key": train.key, "valid_key": valid.key}
    if claims.find_overlap(context.db, **keys) is None:
        assert files.validation is not None
        compared = f"files {files.training.id} and {files.validation.id}"
        found = _compare(context, train, valid, is_unwanted, compared=compared)
        claims.record_overlap(context.db, **keys, num_rows=int(found["rows"]), of_rows=int(found["of_rows"]))


def _compare(
    context: WorkerContext, train: Prepared, valid: Prepared, is_unwanted: Callable[[], bool], *, compared: str
) -> Json:
    """Count the rows of the validation file that are also in the training file. Returns the child's result.

    compared: names both files.
    """
    with scratch_dirs.owned(context.scratch_dir() / f"overlap-{token_hex(8)}") as work:
        work.mkdir()
        paths = {"train": _fetched(context, train, work / "train"), "valid": _fetched(context, valid, work / "valid")}
        request: Json = {name: str(path) for name, path in paths.items()}
        request["in_pairs"] = train.report.get("kind") == "preference"
        num_bytes = sum(path.stat().st_size for path in paths.values())
        action = f"The comparison of {compared} on worker {context.worker_id}"
        try:
            return child_task.run(
                context,
                "worker.children.data_overlap",
                request,
                work=work,
                box=sandbox.tokenization(work, base_dir=None, num_bytes=num_bytes),
                stuck=partial(stuck, action),
                is_unwanted=is_unwanted,
            )
        except ChildFailed as error:
            raise crashed("comparison_failed", error, worker_id=context.worker_id, subject=compared) from error


def _fetched(context: WorkerContext, row: Prepared, into: Path) -> Path:
    """Fetch tokens from the store. Raises DamagedArtifact after deleting a damaged entry, so that the next attempt
    recreates it."""
    assert row.artifact is not None
    try:
        context.store.fetch(context.store.get_manifest(row.artifact), into)
    except DamagedArtifact:
        token_cache.forget(context.db, row.key)
        context.store.empty_damaged(row.artifact)
        raise
    return next(into.glob("*.safetensors"))
