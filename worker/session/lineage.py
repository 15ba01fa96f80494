"""Gathers the content of a finished job's lineage record. catalog.registry.lineage defines its form and its id."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Literal

import rfc8785

from catalog.db.database import read_clock
from catalog.history import queries
from catalog.jobs import commands
from catalog.queue.claiming import Claim
from catalog.registry import base_models, lineage
from catalog.registry.lineage import AttemptRecord, DataSource
from catalog.storage import files, token_cache
from catalog.storage.manifest import DamagedArtifact, Manifest
from catalog.tables.fleet import Trainer
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from worker.context.context import WorkerContext


def record(
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
