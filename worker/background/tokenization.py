"""Tokenizes the files of a job or a plan in a child process, and stores and records the token caches.

For a plan, it also counts the rows that both files share.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from catalog import logs, tracing
from catalog.error_texts import ErrorText
from catalog.lifecycle import preparation
from catalog.lifecycle.preparation import FilesToPrepare
from catalog.logs import Subjects
from catalog.plans import claims
from catalog.spec.job import JobSpec
from catalog.storage import files, token_cache
from catalog.storage.manifest import DamagedArtifact, Manifest
from catalog.tables.jobs import Job
from catalog.tables.storage import File, Prepared
from catalog.tables.table import Json
from catalog.tasks.task_queue import TaskClaim
from worker.background import base_models, child_task
from worker.background.child_task import WorkRefused
from worker.context.context import WorkerContext
from worker.node import scratch_dirs
from worker.process import sandbox
from worker.protocol.mailbox import read_json


class FileRefused(WorkRefused):
    """A file can't be trained on. Its report contains the reason."""


def prepare(context: WorkerContext, task: TaskClaim) -> bool:
    """Prepare the files of a job. Raises StaleClaim and the errors of `prepare_files`."""
    job, wanted = preparation.begin(context.db, task, worker_id=context.worker_id)
    about = {"job": job.id, "claim": task.claim_id, "worker": context.worker_id}
    subjects: Subjects = {"job": job.id, "claim": task.claim_id}
    with logs.about(subjects), tracing.span("prepare", parent=tracing.of_job(job.id, job.trace), about=about):
        train, valid = prepare_files(context, wanted, is_unwanted=child_task.lost_lease(context, task))
        num_steps = wanted.spec.num_steps(num_rows(train.report))
        longest = _longest_example(train, valid)
        preparation.finish(context.db, task, num_steps=num_steps, longest_example=longest)
    return True


def recreate(context: WorkerContext, job: Job, file_id: str, key: str) -> Prepared:
    """Recreate a damaged token cache of a running job: the same tokens under the same key.

    Raises WorkRefused, AttemptFailed, Abandoned, DamagedArtifact if the data file itself is damaged, OutOfSpace,
    Unavailable.
    """
    damaged = token_cache.get(context.db, key)
    token_cache.forget(context.db, key)
    if damaged is not None and damaged.artifact is not None:
        context.store.empty_damaged(damaged.artifact)
    file = files.get(context.db, project_id=job.project_id, file_id=file_id)
    base_dir = base_models.ensure(context, job.base_model, job.base_digest)
    row = _make(context, base_dir, file, key, JobSpec.model_validate(job.spec), is_unwanted=lambda: False)
    return _not_refused(row, "training_file" if file_id == job.training_file else "validation_file")


def num_rows(report: Json) -> int:
    """Return the number of rows, or pairs of answers, that are trained on."""
    return int(report["usable_rows"])


def _longest_example(*files: Prepared | None) -> int:
    """Return the number of tokens in the longest example."""
    return max(int(file.report["longest_example"]) for file in files if file is not None)


def prepare_files(
    context: WorkerContext, wanted: FilesToPrepare, *, is_unwanted: Callable[[], bool] = lambda: False
) -> tuple[Prepared, Prepared | None]:
    """Return the token caches of both files. Missing ones are created. is_unwanted: called several times a second.

    Raises WorkRefused, AttemptFailed, Abandoned, DamagedArtifact, OutOfSpace, Unavailable. A refused file is a
    FileRefused.
    """

    def tokens(file: File, key: str, param: str) -> Prepared:
        row = token_cache.get(context.db, key)
        if row is None or (row.artifact is None and "refusal" not in row.report):
            base_dir = base_models.ensure(context, wanted.base.name, wanted.base_digest, is_unwanted=is_unwanted)
            row = _make(context, base_dir, file, key, wanted.spec, is_unwanted=is_unwanted)
        return _not_refused(row, param)

    train = tokens(wanted.training, wanted.train_key, "training_file")
    if wanted.validation is None or wanted.valid_key is None:
        return train, None
    return train, tokens(wanted.validation, wanted.valid_key, "validation_file")


def _not_refused(row: Prepared, param: str) -> Prepared:
    """Return `row`. Raises FileRefused if its report contains a refusal."""
    if "refusal" in row.report:
        raise FileRefused(ErrorText(**row.report["refusal"], param=param))
    return row


def _make(
    context: WorkerContext, base_dir: Path, file: File, key: str, spec: JobSpec, *, is_unwanted: Callable[[], bool]
) -> Prepared:
    with scratch_dirs.owned(context.scratch_dir() / f"prepare-{token_hex(8)}") as work:
        work.mkdir()
        source = work / "source.jsonl"
        with source.open("wb") as target:
            for chunk in context.store.open_blob(file.digest):
                target.write(chunk)
        report = _run(context, work, source, base_dir, spec, file_id=file.id, is_unwanted=is_unwanted)
        artifact = None
        if "refusal" not in report:
            artifact = _stored(context, work / "tokens", file)
        return token_cache.put(
            context.db,
            key,
            project_id=file.project_id,
            file_digest=file.digest,
            artifact=artifact,
            report=report,
            details=read_json(work / "details.json"),
        )


def _stored(context: WorkerContext, folder: Path, file: File) -> Manifest:
    try:
        return context.store.put_folder(folder, kind="tokens")
    except DamagedArtifact as error:
        raise DamagedArtifact(
            "tokens_not_storable", worker_id=context.worker_id, file=file.id, message=error.message
        ) from error


def _run(
    context: WorkerContext,
    work: Path,
    source: Path,
    base_dir: Path,
    spec: JobSpec,
    *,
    file_id: str,
    is_unwanted: Callable[[], bool],
) -> Json:
    """Run the child that tokenizes a file. Returns its report."""
    tokens = work / "tokens"
    tokens.mkdir()
    request: Json = {
        "source": str(source),
        "base_dir": str(base_dir),
        "max_length": spec.max_length,
        "data": spec.data.model_dump(),
        "out": str(tokens / "tokens.safetensors"),
        "details": str(work / "details.json"),
    }
    return child_task.run(
        context,
        "worker.children.tokenizer.main",
        request,
        work=work,
        box=sandbox.tokenization(work, base_dir=base_dir, num_bytes=source.stat().st_size),
        action=f"The tokenization of file {file_id}",
        crash="preparation_crashed",
        is_unwanted=is_unwanted,
    )


def compute_plan(context: WorkerContext, task: TaskClaim) -> bool:
    """Compute a plan. Raises StaleClaim and the errors of `prepare_files`."""
    files = claims.begin(context.db, task)
    if files is None:
        return True
    with suppress(FileRefused):  # the plan shows the refusal in the file's report
        _prepare_plan(context, files, child_task.lost_lease(context, task))
    claims.conclude(context.db, task, settings=context.settings)
    return True


def _prepare_plan(context: WorkerContext, files: FilesToPrepare, is_unwanted: Callable[[], bool]) -> None:
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
        return child_task.run(
            context,
            "worker.children.data_overlap",
            request,
            work=work,
            box=sandbox.tokenization(work, base_dir=None, num_bytes=num_bytes),
            action=f"The comparison of {compared}",
            crash="comparison_crashed",
            is_unwanted=is_unwanted,
        )


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
