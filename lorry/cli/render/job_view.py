"""The details of one job: its state and its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorry.cli.commands.files import flatten
from lorry.cli.render import output, progress_bars

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models import Job


def sheet(job: Job, *, why: str | None, usable_rows: int | None) -> Iterator[tuple[str, object]]:
    """Yield labels and values. why: the explanation of its waiting. usable_rows: of the training file, if known."""
    yield "id", job.id
    yield "status", status(job)
    yield "why", why
    yield from _run(job)
    yield from _configuration(job, usable_rows)


_PHASES = {"loading": "loading the base model", "verifying": "verifying the adapter"}


def status(job: Job) -> str:
    for wanted, verb in ((job.cancel_requested, "cancelled"), (job.pause_requested, "paused")):
        if wanted and job.status == "running":
            return f"running, and will be {verb} within seconds"
    if job.status == "running" and job.phase in _PHASES:
        return f"running: {_PHASES[job.phase]}"
    if job.is_held and not job.is_final:
        return f"{job.status} and held. Release it with: lorry jobs release {job.id}"
    return progress_bars.how_to_resume(job) if job.status == "paused" else job.status


def steps(job: Job) -> str | None:
    return f"{job.progress.step}/{job.progress.num_steps}" if job.progress.num_steps else None


def epochs(job: Job, usable_rows: int | None) -> str | None:
    """Return the passes over the training file; `max_steps` may stop a job before the requested epochs."""
    requested, batch_size = job.hyperparameters.get("n_epochs"), job.hyperparameters.get("batch_size")
    num_steps = job.progress.num_steps
    if requested is None or job.max_steps is None or 0 < num_steps < job.max_steps:
        return None if requested is None else str(requested)
    if usable_rows and batch_size and num_steps:
        trained = job.max_steps * batch_size / usable_rows
        return str(requested) if trained >= requested else f"{trained:.2g} of {requested} (limited by max steps)"
    return f"{requested} or fewer (limited by max steps)"


def _run(job: Job) -> Iterator[tuple[str, object]]:
    """Yield the state and the progress."""
    progress = job.progress
    is_active = not job.is_final and job.status != "paused"
    yield "error", job.error and f"{job.error.message} {job.error.remedy}".strip()
    yield "model", job.model
    yield "continues", job.parent_adapter
    yield "reproduces", job.reproduces and job.reproduces.name
    yield "reproduction", job.reproduces and job.reproduces.message
    yield "adapter", job.fine_tuned_model
    yield "curves", ", ".join(job.result_files)
    yield "step", steps(job)
    yield "stopped early", progress.stopped_early
    yield "weights of step", progress.kept_step
    yield "loss", progress.loss
    yield from _validation_losses(job)
    yield "time left", output.duration(progress.seconds_left) if is_active else None
    yield "trained tokens", None if job.trained_tokens is None else f"{job.trained_tokens:,}"
    yield "attempt", job.attempt or None
    yield "trainer", job.trainer_id
    yield "created", output.when(job.created_at)
    yield "finished", output.when(job.finished_at)
    yield (
        "took" if job.is_final else "took so far",
        output.duration(job.seconds_running) if job.seconds_running else None,
    )


def _validation_losses(job: Job) -> Iterator[tuple[str, object]]:
    """Yield the adapter's own loss first, if its weights are not those of the last step."""
    progress = job.progress
    result = progress_bars.validation_loss(job)
    if progress.kept_valid_loss is None or progress.kept_step == progress.step:
        yield "validation loss", result
    else:
        yield "validation loss", f"{output.cell(result)} at step {progress.kept_step} (used for the adapter)"
        yield "validation loss of the last step", progress.valid_loss
    if progress.best_valid_loss != result:
        yield "best validation loss", progress.best_valid_loss


def _configuration(job: Job, usable_rows: int | None) -> Iterator[tuple[str, object]]:
    """Yield the whole configuration."""
    yield "training file", job.training_file
    yield "validation file", job.validation_file
    yield "suffix", job.suffix
    yield "seed", job.seed
    yield "priority", job.priority
    yield "deadline", job.deadline and output.when(job.deadline)
    yield "precision", job.precision
    yield "quantization", job.quantization
    yield "max length", job.max_length and f"{job.max_length} tokens"
    yield "max steps", job.max_steps
    yield "method", job.method.get("type")
    yield from _method_hyperparameters(job)
    yield "epochs", epochs(job, usable_rows)
    yield "batch size", job.hyperparameters.get("batch_size")
    yield "learning rate multiplier", job.hyperparameters.get("learning_rate_multiplier")
    yield "checkpoint every", job.checkpoint_every_steps and f"{job.checkpoint_every_steps} steps"
    if job.evaluation and job.validation_file:
        every = job.evaluation.get("every_steps")
        yield "evaluation", f"every {every} steps" if every else "every tenth of the job"
        yield "kept weights", job.evaluation.get("keep")
        samples: dict[str, Any] = job.evaluation.get("samples") or {}
        yield "sample prompts", "\n".join(samples.get("prompts", ()))
        yield "sample max tokens", samples.get("max_tokens")
    yield from flatten({"early_stopping": job.early_stopping or {}})
    yield from flatten({"data": job.data, "lora": job.lora, "optimizer": job.optimizer, "schedule": job.schedule})
    yield from flatten({"metadata": job.metadata or {}})
    yield "tags", ", ".join(job.tags)


def _method_hyperparameters(job: Job) -> Iterator[tuple[str, object]]:
    """Yield the hyperparameters that not every method has."""
    given: dict[str, Any] = job.method.get(job.method.get("type", ""), {}).get("hyperparameters", {})
    return ((name.replace("_", " "), value) for name, value in given.items() if name not in job.hyperparameters)
