"""Copies the files of a claimed job into the trainer's directory: its tokens, and the state to resume from."""

from __future__ import annotations

import math
from pathlib import Path

from catalog.history import events
from catalog.lifecycle import failures, recording
from catalog.queue.claiming import Claim
from catalog.registry import base_models
from catalog.spec.job import JobSpec
from catalog.storage import token_cache
from catalog.storage.manifest import DamagedArtifact
from catalog.tables.history import Checkpoint
from catalog.tables.storage import BaseModelRow
from worker.background import tokenization
from worker.context.context import WorkerContext
from worker.protocol.mailbox import AdmitBody, TrainerDirectory


def stage_files(
    context: WorkerContext, directory: TrainerDirectory, claim: Claim, checkpoints: list[Checkpoint]
) -> AdmitBody:
    """Copy the files of a job, and return the body of its `admit` message. Damaged checkpoints are removed from the
    list, and damaged token caches are recreated.

    Raises DamagedArtifact if the data file itself or the parent adapter is damaged, FileRefused, Abandoned,
    OutOfSpace, Unavailable.
    """
    job, spec = claim.job, JobSpec.model_validate(claim.job.spec)
    assert job.num_steps is not None
    folder = directory.job_path(claim.claim_id)
    train = _stage_tokens(context, claim, job.training_file, job.train_prepared, folder / "train")
    valid = _stage_tokens(context, claim, job.validation_file, job.valid_prepared, folder / "valid")
    resume = _fetch_newest(context, claim, checkpoints, folder / "resume")
    parent = _stage_parent(context, spec, folder / "parent")
    assert train is not None
    base_name, base_revision = _base_reference(base_models.get(context.db, job.base_model))
    return {
        "claim_id": claim.claim_id,
        "job_id": job.id,
        "base_name": base_name,
        "base_revision": base_revision,
        "spec": job.spec,
        "answered_steps": events.answered_steps(context.db, job.id) if spec.evaluation.samples else [],
        "asks_as_chat": _uses_template(context, job.train_prepared),
        "shortages": failures.memory_rung(context.db, job),
        "num_steps": job.num_steps,
        "evaluate_every_steps": _evaluate_every(spec, job.num_steps),
        "checkpoint_every_steps": spec.checkpoint_every_steps,
        "train": directory.named(train),
        "valid": _named(directory, valid),
        "resume": _named(directory, resume),
        "parent": _named(directory, parent),
        "trace": context.spans.of(claim.claim_id),
    }


def _base_reference(base: BaseModelRow) -> tuple[str, str | None]:
    """Return `base_model_name_or_path` and `revision` of adapter_config.json: the id on the Hub and its commit. A
    model of another source has its name in Lorry, because its path is meaningless on other hosts."""
    if base.kind != "hub":
        return base.name, None
    return base.source, (base.manifest or {}).get("revision") or base.revision


def _named(directory: TrainerDirectory, path: Path | None) -> str | None:
    return None if path is None else directory.named(path)


def _evaluate_every(spec: JobSpec, num_steps: int) -> int:
    """Return the interval between evaluations, limited to all steps: the engine rejects settings without effect."""
    return min(spec.evaluation.every_steps or math.ceil(num_steps / 10), num_steps)


def fall_back(context: WorkerContext, claim: Claim, checkpoints: list[Checkpoint], problem: str) -> None:
    """Remove the newest checkpoint from the list, and never use it again. Events explain the lost steps to users.

    The list changes last, so that a repetition after an outage does not remove a second checkpoint.
    """
    bad, *remaining = checkpoints
    recording.distrust_checkpoint(context.db, claim.claim_id, checkpoint_id=bad.id, problem=problem)
    resumption = (
        f"continues from the checkpoint of step {remaining[0].step}" if remaining else "starts again from step 0"
    )
    data = {"step": bad.step, "resumes_from": remaining[0].step if remaining else 0}
    recording.record_event(context.db, claim.claim_id, "warn", f"The job {resumption}.", data)
    del checkpoints[0]


def _stage_tokens(
    context: WorkerContext, claim: Claim, file_id: str | None, key: str | None, into: Path
) -> Path | None:
    if file_id is None or key is None:
        return None
    try:
        return _fetch_tokens(context, key, into)
    except DamagedArtifact as error:
        message = f"The tokens of {file_id} can't be used and are recreated: {error.message}"
        recording.record_event(context.db, claim.claim_id, "warn", message)
    tokenization.recreate(context, claim.job, file_id, key)
    return _fetch_tokens(context, key, into)


def _fetch_tokens(context: WorkerContext, key: str, into: Path) -> Path:
    row = token_cache.get(context.db, key)
    if row is None or row.artifact is None:
        raise DamagedArtifact("token_cache_missing", key=key)
    if not into.is_dir():
        context.store.fetch(context.store.get_manifest(row.artifact), into)
    return next(into.glob("*.safetensors"))


def _stage_parent(context: WorkerContext, spec: JobSpec, into: Path) -> Path | None:
    """Fetch the adapter that the job continues, and verify its digests. A job that resumes needs it too: preference
    losses use it as the reference, and the checkpoint refers to it."""
    if spec.parent is None:
        return None
    try:
        if not into.is_dir():
            context.store.fetch(context.store.get_manifest(spec.parent.artifact), into)
    except DamagedArtifact as error:
        raise DamagedArtifact("parent_adapter_damaged", parent=spec.parent.name, message=error.message) from error
    return into


def _uses_template(context: WorkerContext, key: str) -> bool:
    """Return whether the training rows use the chat template. If they do, prompts use it as well."""
    row = token_cache.get(context.db, key)
    return row is not None and "chat_template" in row.report


def _fetch_newest(context: WorkerContext, claim: Claim, checkpoints: list[Checkpoint], into: Path) -> Path | None:
    """Fetch the newest checkpoint whose files all have their recorded digests. Returns None if there is none."""
    while checkpoints:
        newest = checkpoints[0]
        assert newest.artifact is not None
        folder = into / f"step-{newest.step}"
        try:
            if not folder.is_dir():
                context.store.fetch(context.store.get_manifest(newest.artifact), folder)
        except DamagedArtifact as error:
            context.store.empty_damaged(newest.artifact)  # so that the same bytes can be stored again at the same step
            fall_back(context, claim, checkpoints, error.message)
        else:
            return folder
    return None
