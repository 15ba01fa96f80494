"""Publishes the files of a trainer: checkpoints, and adapters that PEFT has verified, with their lineage records."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Literal

import rfc8785

from catalog import failpoints
from catalog.db.database import read_clock
from catalog.errors import LorryError, OutOfSpace, StaleClaim, Unavailable
from catalog.exports import model_card
from catalog.history import queries, result_files
from catalog.history.metric_points import Point
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.lifecycle.recording import Course
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.registry import base_models, lineage
from catalog.registry.lineage import AttemptRecord, DataSource, describing, lineage_id
from catalog.storage import files, token_cache
from catalog.storage.manifest import DamagedArtifact, Manifest, ManifestFile
from catalog.tables.fleet import Trainer
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from worker.context.context import WorkerContext
from worker.node import scratch_dirs
from worker.protocol.mailbox import TrainerDirectory
from worker.protocol.trainer_paths import UnsafePath

log = logging.getLogger(__name__)
MAX_EXPONENT = 700.0
"""exp of a larger number overflows a float."""


def checkpoint(
    context: WorkerContext, claim: Claim, directory: TrainerDirectory, saved: Json, *, trainer: Json
) -> None:
    """Store a checkpoint's files, then its row. If the store is full, the checkpoint is lost, but the job continues.

    saved: the trainer's event. trainer: its `ready` event.
    """
    failpoints.pass_by("uploading")
    step = saved["step"]
    try:
        manifest = _stored(context, claim, directory, saved["folder"], kind="checkpoint")
        exported = _try_export(context, claim, directory, saved, trainer)
        recording.record_checkpoint(context.db, claim.claim_id, step=step, artifact=manifest, exported=exported)
    except OutOfSpace as error:
        message = f"The checkpoint of step {step} was not stored. {error.sentence()}"
        recording.record_event(context.db, claim.claim_id, "warn", message)


def model_of_checkpoint(
    context: WorkerContext, claim: Claim, directory: TrainerDirectory, saved: Json, *, trainer: Json
) -> None:
    """Store the weights of a checkpoint that is already recorded, if the trainer wrote them.

    saved: the trainer's event. trainer: its `ready` event.
    """
    exported = _try_export(context, claim, directory, saved, trainer)
    if exported is not None:
        recording.record_checkpoint_model(context.db, claim.claim_id, step=saved["step"], exported=exported)


def no_model(context: WorkerContext, claim: Claim, *, step: int, reason: str) -> None:
    """Record why a valid checkpoint can't be used as a model."""
    message = f"The checkpoint of step {step} can't be used as a model. {reason}"
    recording.record_event(context.db, claim.claim_id, "warn", message)


def _try_export(
    context: WorkerContext, claim: Claim, directory: TrainerDirectory, saved: Json, trainer: Json
) -> recording.Exported | None:
    """Return the checkpoint's adapter. None if the trainer wrote none, or it can't be published; then the checkpoint
    can be resumed from, but not used as a model."""
    if saved.get("adapter") is None:
        return None
    try:
        return _exported(context, claim, directory, saved, trainer)
    except (StaleClaim, Unavailable, UnsafePath):
        raise
    except Exception as error:  # the job continues without the model, whatever the error is
        log.exception("%s", claim.job.id)
        unexpected = f"{type(error).__name__}; see the worker's log."  # its text may contain paths of the server
        reason = error.sentence() if isinstance(error, LorryError) else unexpected
        no_model(context, claim, step=saved["step"], reason=reason)
        return None


def _exported(
    context: WorkerContext, claim: Claim, directory: TrainerDirectory, saved: Json, trainer: Json
) -> recording.Exported:
    """Store the checkpoint's weights as an adapter. Returns it with its lineage record, which covers the steps so
    far."""
    manifest = _stored(context, claim, directory, saved["adapter"], kind="adapter")
    draft = draft_lineage(
        context,
        claim,
        manifest,
        num_parameters=saved["num_parameters"],
        trainer=trainer,
        results={"steps": saved["step"], "kept_step": saved["step"], "stopped_early": None, "is_checkpoint": True},
        is_final=False,
    )
    manifest, record = _with_card(context, manifest, draft)
    return recording.Exported(artifact=manifest, lineage=record, lineage_id=lineage_id(record))


def _with_card(context: WorkerContext, manifest: Manifest, record: Json) -> tuple[Manifest, Json]:
    """Add the model card to an adapter. Returns the new manifest, and the lineage record of its files.

    The card is part of the manifest, so the digests cover it. It therefore omits what is known only later: the name of
    the adapter, the id of the record, and the latency of an export.
    """
    card = context.store.put_bytes(model_card.render(record))
    entry = ManifestFile(path=model_card.NAME, digest=card.digest, num_bytes=card.num_bytes)
    others = [file for file in manifest.files if file.path != model_card.NAME]
    carded = Manifest.of(manifest.kind, [*others, entry])
    context.store.put_manifest(carded)
    return carded, describing(record, carded)


def _stored(context: WorkerContext, claim: Claim, directory: TrainerDirectory, name: object, *, kind: str) -> Manifest:
    """Store a folder that the trainer reported of this job. Raises UnsafePath, DamagedArtifact."""
    try:
        with directory.opened(claim.claim_id, name) as entry:
            return context.store.put_folder(Path(entry.name), dir_fd=entry.dir_fd, kind=kind)
    except FileNotFoundError as error:
        raise DamagedArtifact("trainer_folder_missing", worker_id=context.worker_id, name=str(name)) from error
    except DamagedArtifact as error:
        raise DamagedArtifact(
            "trainer_folder_not_storable", worker_id=context.worker_id, name=str(name), message=error.message
        ) from error


def adapter(
    context: WorkerContext, claim: Claim, directory: TrainerDirectory, exported: Json, *, trainer: Json
) -> None:
    """Store an adapter's files and the job's curves, then complete the job with them in one transaction.

    exported: the trainer's event, whose report has passed. trainer: its `ready` event. Raises UnsafePath.
    """
    failpoints.pass_by("uploading")
    manifest = _stored(context, claim, directory, exported["folder"], kind="adapter")
    course = Course(steps=exported["step"], kept_step=exported["kept_step"], stopped_early=exported["stopped_early"])
    evaluation = evaluate(context, claim, kept_step=course.kept_step)
    with scratch_dirs.owned(context.scratch_dir() / f"curves-{token_hex(8)}") as folder:
        folder.mkdir()
        path = folder / result_files.NAME
        curves = result_files.store_curves(context.db, context.store, job_id=claim.job.id, path=path)
    draft = draft_lineage(
        context,
        claim,
        manifest,
        num_parameters=exported["num_parameters"],
        trainer=trainer,
        results={
            **asdict(course),
            "trained_tokens": exported["trained_tokens"],
            "evaluation": evaluation,
            "verification": exported["report"],
            "memory": exported.get("memory"),
        },
    )
    manifest, record = _with_card(context, manifest, draft)
    failpoints.pass_by("before_complete")
    claims.complete(
        context.db,
        claim.claim_id,
        artifact=manifest,
        num_parameters=exported["num_parameters"],
        verification=exported["report"],
        evaluation=evaluation,
        trained_tokens=exported["trained_tokens"],
        course=course,
        curves=curves,
        lineage=record,
        lineage_id=lineage_id(record),
        policy=context.policy,
    )
    failpoints.pass_by("after_complete")


def evaluate(context: WorkerContext, claim: Claim, *, kept_step: int) -> Json | None:
    """Return the validation loss of the adapter, and that of the job's start (the base model or its parent adapter),
    from the recorded curve. None without a curve.

    kept_step: the step whose weights the adapter has.
    """
    points = queries.metrics(context.db, project_id=claim.job.project_id, job_id=claim.job.id, kind="valid")
    if not points:
        return None
    first, last = points[0], [point for point in points if point.step <= kept_step][-1]
    began = "base" if claim.job.parent_adapter is None else "parent"
    return {
        f"{began}_loss": first.loss,
        "loss": last.loss,
        **_of_the_method(first, last, began),
        f"{began}_token_accuracy": first.token_accuracy,
        "token_accuracy": last.token_accuracy,
        "step": last.step,
    }


def _of_the_method(first: Point, last: Point, began: str) -> Json:
    """Return the rewards if the loss compares answers, and else the perplexities."""
    if last.rewards is not None:
        return {"rewards": last.rewards}
    return {f"{began}_perplexity": perplexity(first.loss), "perplexity": perplexity(last.loss)}


def perplexity(loss: float) -> float:
    """Return exp(loss), limited so that it does not overflow a float."""
    return math.exp(min(loss, MAX_EXPONENT))


def draft_lineage(
    context: WorkerContext,
    claim: Claim,
    adapter: Manifest,
    *,
    num_parameters: int,
    trainer: Json,
    results: Json,
    is_final: bool = True,
) -> Json:
    """Return the lineage record.

    trainer: the `ready` event of the trainer that wrote the adapter. is_final: False for a checkpoint, whose job
    continues. Such a record has no finish time and no digest of the curves. Its `determinism` holds for all steps: it
    is the weakest guarantee of the trainers that computed them.
    """
    job = commands.get(context.db, project_id=claim.job.project_id, job_id=claim.job.id)
    with context.db.read() as session:
        finished_at = read_clock(session) if is_final else None
    attempts = _attempts(context, job)
    return lineage.build(
        job=job,
        base=base_models.get(context.db, job.base_model),
        adapter=adapter,
        num_parameters=num_parameters,
        data=_data(context, job),
        attempts=attempts,
        results={
            **results,
            **({"loss_log": _loss_log_digest(context, job)} if is_final else {}),
            "determinism": weakest([trainer["invariance"], *earlier_guarantees(attempts)]),
        },
        code=trainer["versions"],
        parents=[parent["lineage"]] if (parent := job.spec.get("parent")) else [],
        finished_at=finished_at,
    )


def weakest(guarantees: Sequence[str]) -> str:
    return "bitwise" if set(guarantees) == {"bitwise"} else "allclose"


def earlier_guarantees(attempts: Sequence[AttemptRecord]) -> list[str]:
    """Return the determinism guarantees of the earlier trainers whose steps the last attempt continues."""
    indices = lineage.contributing([(entry.attempt.resumed_from_step, entry.trainer) for entry in attempts])
    return [attempts[index].trainer.get("invariance") or "allclose" for index in reversed(indices[:-1])]


def _data(context: WorkerContext, job: Job) -> list[DataSource]:
    sources = [_source(context, job.project_id, "training", job.training_file, job.train_prepared)]
    if job.validation_file is not None:
        assert job.valid_prepared is not None, "each file of a job has a key"
        sources.append(_source(context, job.project_id, "validation", job.validation_file, job.valid_prepared))
    return sources


def _source(
    context: WorkerContext, project_id: str, role: Literal["training", "validation"], file_id: str, key: str
) -> DataSource:
    tokens = token_cache.get(context.db, key)
    if tokens is None or tokens.artifact is None:  # another job found the files damaged, and recreates them
        raise DamagedArtifact("tokens_missing", file_id=file_id)
    file = files.get(context.db, project_id=project_id, file_id=file_id)
    return DataSource(role=role, file=file, tokens=tokens.artifact, report=tokens.report)


def _attempts(context: WorkerContext, job: Job) -> list[AttemptRecord]:
    packmates = queries.packmates(context.db, project_id=job.project_id, job_id=job.id)
    attempts = queries.attempts(context.db, project_id=job.project_id, job_id=job.id)
    with context.db.read() as session:
        trainers = [session.get(Trainer, attempt.trainer_id) for attempt in attempts]
    return [
        AttemptRecord(
            attempt=attempt,
            trainer=(trainer.report if trainer else None) or {},
            packmates=packmates.get(attempt.claim_id, []),
        )
        for attempt, trainer in zip(attempts, trainers, strict=True)
    ]


def _loss_log_digest(context: WorkerContext, job: Job) -> str:
    """Return the SHA-256 of all points of both curves, in RFC 8785 JSON: [kind, step, loss]."""
    points = [
        [kind, point.step, point.loss]
        for kind in ("train", "valid")
        for point in queries.metrics(context.db, project_id=job.project_id, job_id=job.id, kind=kind)
    ]
    return sha256(rfc8785.dumps(points)).hexdigest()
