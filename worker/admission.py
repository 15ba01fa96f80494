"""Brings what a claimed job needs into the trainer's directory: its tokens, and the state to resume from."""

from __future__ import annotations

import math
from pathlib import Path

from catalog import claims, prepared
from catalog.artifacts.manifest import DamagedArtifact
from catalog.claims import Claim
from catalog.spec import JobSpec
from catalog.tables import Checkpoint, Json
from worker.context import WorkerContext
from worker.trainer_directory import TrainerDirectory


def tokens_before(checkpoints: list[Checkpoint]) -> int:
    """Tokens that the job had trained on at the point where it resumes."""
    return int(checkpoints[0].metrics.get("trained_tokens", 0)) if checkpoints else 0


def bring_files(
    context: WorkerContext, directory: TrainerDirectory, claim: Claim, checkpoints: list[Checkpoint]
) -> Json:
    """The body of an `admit` message, its files in place. Damaged checkpoints are taken off the list.

    Raises DamagedArtifact where the tokens are damaged, OutOfSpace, Unavailable.
    """
    job, spec = claim.job, JobSpec.model_validate(claim.job.spec)
    assert job.num_steps is not None
    assert job.train_prepared is not None
    folder = directory.job_path(claim.claim_id)
    paths = {
        "train": _fetch_tokens(context, job.train_prepared, folder / "train"),
        "valid": _fetch_tokens(context, job.valid_prepared, folder / "valid") if job.valid_prepared else None,
        "resume": _fetch_newest(context, claim, checkpoints, folder / "resume"),
    }
    return {
        "claim_id": claim.claim_id,
        "job_id": job.id,
        "base_name": job.base_model,
        "spec": job.spec,
        "num_steps": job.num_steps,
        "evaluate_every_steps": spec.evaluate_every_steps or max(1, math.ceil(job.num_steps / 10)),
        "checkpoint_every_steps": spec.checkpoint_every_steps,
        **{name: str(path.relative_to(directory.path)) if path else None for name, path in paths.items()},
    }


def fall_back(context: WorkerContext, claim: Claim, bad: Checkpoint, left: list[Checkpoint], why: str) -> None:
    """Events, so that nobody wonders where the steps went; the bad one is never tried again."""
    claims.distrust_checkpoint(context.db, claim.claim_id, checkpoint_id=bad.id, problem=why)
    onwards = f"continues from the checkpoint of step {left[0].step}" if left else "starts again from step 0"
    data = {"step": bad.step, "resumes_from": left[0].step if left else 0}
    claims.record_event(context.db, claim.claim_id, "warn", f"The job {onwards}.", data)


def _fetch_tokens(context: WorkerContext, key: str, into: Path) -> Path:
    row = prepared.get(context.db, key)
    if row is None or row.artifact is None:
        raise DamagedArtifact(f"The token cache {key} is missing.")
    if not into.is_dir():
        context.store.fetch(context.store.get_manifest(row.artifact), into)
    return next(into.glob("*.safetensors"))


def _fetch_newest(context: WorkerContext, claim: Claim, checkpoints: list[Checkpoint], into: Path) -> Path | None:
    """The newest checkpoint whose every file has the digest that was recorded; None where there is none."""
    while checkpoints:
        newest = checkpoints[0]
        assert newest.artifact is not None
        folder = into / f"step-{newest.step}"
        try:
            context.store.fetch(context.store.get_manifest(newest.artifact), folder)
        except DamagedArtifact as error:
            del checkpoints[0]
            fall_back(context, claim, newest, checkpoints, error.message)
        else:
            return folder
    return None
