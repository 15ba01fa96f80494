"""`lorry jobs`: submit, look, watch, steer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli import output, watching
from lorry.cli.app import Sectioned, client, group
from lorry.cli.files import flatten
from lorry.cli.output import AsJson
from lorry.cli.submit import submit
from lorry.cli.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models import Job, JobEvent

app = group("Fine-tuning jobs.")

JobId = Annotated[str, typer.Argument(help="The job's id.")]


app.command(cls=Sectioned)(submit)


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
    watching.stay(client(), job_ids, as_json=as_json)


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
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="The last so many. Default: all.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job is done.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="The losses of single steps too.")] = False,
    as_json: AsJson = False,
) -> None:
    """The job's events, oldest first."""
    lorry = client()
    past = list(lorry.jobs.events(job_id, type=None if metrics else "message", limit=limit))
    for event in reversed(past):
        _print_event(event, as_json=as_json)
    if follow:
        for update in lorry.jobs.follow(job_id, after_event=past[0].id if past else None):
            if update.event is not None and (metrics or update.event.type != "metrics"):
                _print_event(update.event, as_json=as_json)


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
