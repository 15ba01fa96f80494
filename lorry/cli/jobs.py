"""`lorry jobs`: submit, look, watch, steer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lorry.cli import output, watching
from lorry.cli.app import EXIT_REFUSED, client, group
from lorry.cli.files import flatten, upload_with_bar
from lorry.cli.output import AsJson
from lorry.cli.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorry import requests
    from lorry.client import Lorry
    from lorry.models import Job, JobEvent

app = group("Fine-tuning jobs.")

JobId = Annotated[str, typer.Argument(help="The job's id.")]


class Priority(StrEnum):
    """Whose turn comes first."""

    urgent = "urgent"
    normal = "normal"
    batch = "batch"


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="A base model's name.")],
    training: Annotated[
        str, typer.Argument(metavar="TRAIN", help="A JSONL file's path, or the id of an uploaded one.")
    ],
    *,
    valid: Annotated[str | None, typer.Option(help="Held-out file: a path or an id.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The update is scaled by alpha/rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Probability of dropping an input of A.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Linear layer to adapt; may be repeated.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training file.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same adapter.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Becomes part of the adapter's name.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Class in the queue.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and draw its progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a job; files that are paths are uploaded first."""
    lorry = client()
    lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "target_modules": target or None}
    numbers = {"batch_size": batch_size, "n_epochs": epochs}
    job = lorry.jobs.create(
        model=model,
        training_file=_file_id(lorry, training),
        validation_file=None if valid is None else _file_id(lorry, valid),
        suffix=suffix,
        seed=seed,
        lora=cast("requests.Lora | None", _given(lora)),
        optimizer=None if learning_rate is None else {"learning_rate": learning_rate},
        hyperparameters=cast("requests.Hyperparameters | None", _given(numbers)),
        max_steps=max_steps,
        priority=None if priority is None else priority.value,
    )
    if watch:
        _watch(lorry, [job.id], as_json=as_json)
    elif as_json:
        output.print_json(job.raw)
    else:
        output.console().print(job.id)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Newest first."""
    jobs = list(client().jobs.list(limit=limit))
    if as_json:
        return output.print_json([job.raw for job in jobs])
    rows = [(j.id, j.status, j.model, _steps(j), j.progress.loss, output.briefly(j.created_at)) for j in jobs]
    columns = (
        Column(title="ID"),
        Column(title="STATUS"),
        Column(title="MODEL", goes=2, narrowest=10),
        Column(title="STEP"),
        Column(title="LOSS", goes=1),
        Column(title="CREATED", goes=3),
    )
    table(columns, rows, empty="There is no job yet. Start one with `lorry jobs submit MODEL TRAIN`.")
    if any(job.status == "paused" for job in jobs):
        output.say("A paused job goes on with: lorry jobs resume ID")
    return None


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Everything about one job, and why it waits."""
    lorry = client()
    job = lorry.jobs.get(job_id)
    if as_json:
        return output.print_json(job.raw)
    waits = job.status in {"queued", "validating_files"}
    why = lorry.jobs.why(job_id).get("explanation") if waits else None
    output.pairs((("id", job.id), ("status", _status(job)), ("why", why), *_run(job), *_configuration(job)))
    return None


@app.command()
def watch(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB...", help="One or more ids.")],
    as_json: AsJson = False,
) -> None:
    """Draw live bars until all are done. Exit code 1 if one did not succeed."""
    _watch(client(), job_ids, as_json=as_json)


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """End a job for good."""
    _told(client().jobs.cancel(job_id), as_json=as_json)


@app.command()
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Stop a job at its last checkpoint; `resume` goes on from there."""
    _told(client().jobs.pause(job_id), as_json=as_json)


@app.command()
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Put a paused job back into the queue."""
    _told(client().jobs.resume(job_id), as_json=as_json)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job is done.")] = False,
    as_json: AsJson = False,
) -> None:
    """The job's events, oldest first."""
    lorry = client()
    events = (
        (update.event for update in lorry.jobs.follow(job_id) if update.event is not None)
        if follow
        else reversed(list(lorry.jobs.events(job_id)))
    )
    for event in events:
        _print_event(event, as_json=as_json)


def _watch(lorry: Lorry, job_ids: list[str], *, as_json: bool) -> None:
    try:
        jobs = watching.watch(lorry, job_ids, as_json=as_json)
    except KeyboardInterrupt:
        output.say(f"No longer watching; training goes on. Watch again: lorry jobs watch {' '.join(job_ids)}")
        raise
    if any(job.status != "succeeded" for job in jobs):
        raise typer.Exit(EXIT_REFUSED)


def _file_id(lorry: Lorry, path_or_id: str) -> str:
    """The id of an uploaded file; a path is uploaded. A path that is there wins over an id that looks like it."""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return upload_with_bar(lorry, path).id
    if path_or_id.startswith("file-") and "/" not in path_or_id:
        return path_or_id
    raise typer.BadParameter(f"{path_or_id!r} is neither a file here nor the id of an uploaded one (file-…).")


def _given(values: Mapping[str, object]) -> dict[str, object] | None:
    return {name: value for name, value in values.items() if value is not None} or None


def _run(job: Job) -> Iterator[tuple[str, object]]:
    """What has become of it."""
    progress = job.progress
    moves = not job.is_final and job.status != "paused"
    yield "error", job.error and f"{job.error.message} {job.error.remedy}".strip()
    yield "model", job.model
    yield "adapter", job.fine_tuned_model
    yield "step", _steps(job)
    yield "loss", progress.loss
    yield "time left", output.duration(progress.seconds_left) if moves else None
    yield "trained tokens", job.trained_tokens
    yield "attempt", job.attempt or None
    yield "trainer", job.trainer_id
    yield "created", output.when(job.created_at)
    yield "finished", output.when(job.finished_at)


def _configuration(job: Job) -> Iterator[tuple[str, object]]:
    """What it was asked to do, in full."""
    yield "training file", job.training_file
    yield "validation file", job.validation_file
    yield "suffix", job.suffix
    yield "seed", job.seed
    yield "priority", job.priority
    yield "precision", job.precision
    yield "max length", job.max_length
    yield "max steps", job.max_steps
    yield "checkpoint every", job.checkpoint_every_steps and f"{job.checkpoint_every_steps} steps"
    if job.evaluation:
        every = job.evaluation.get("every_steps")
        yield "evaluation every", f"{every} steps" if every else "tenth of the job"
    groups = {"hyperparameters": job.hyperparameters, "lora": job.lora, "optimizer": job.optimizer}
    yield from flatten({**groups, "schedule": job.schedule})


def _told(job: Job, *, as_json: bool) -> None:
    if as_json:
        output.print_json(job.raw)
    else:
        end = "" if job.status == "paused" else "."  # a dot would be taken for part of the command
        output.say(f"{job.id} is {_status(job)}{end}")


def _status(job: Job) -> str:
    for wanted, verb in ((job.cancel_requested, "cancelled"), (job.pause_requested, "paused")):
        if wanted and job.status == "running":
            return f"running, and will be {verb} at its next tick"
    return watching.how_to_resume(job) if job.status == "paused" else job.status


def _steps(job: Job) -> str | None:
    return f"{job.progress.step}/{job.progress.num_steps}" if job.progress.num_steps else None


def _print_event(event: JobEvent, *, as_json: bool) -> None:
    if as_json:
        output.print_json_line(event.raw)
    else:
        line = f"{output.when(event.created_at)}  {event.level:5}  {event.message}"
        output.console().print(output.clean(line), soft_wrap=True)
