"""`lorry jobs`: submit, look, watch, steer."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import Sectioned, client, group
from lorry.cli.commands.submit import submit
from lorry.cli.parsing.option_values import pair
from lorry.cli.render import job_view, output, progress_bars
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models.jobs import Job, JobEvent

app = group("Fine-tuning jobs.")

_SUFFIX = "SUFFIX"
_COLUMNS = (
    Column(title="ID"),
    Column(title="STATUS"),
    Column(title=_SUFFIX, goes=3, narrowest=8),
    Column(title="MODEL", goes=4, narrowest=10),
    Column(title="STEP"),
    Column(title="LOSS", goes=2),
    Column(title="HELD-OUT", goes=1),
    Column(title="TOOK", goes=5),
    Column(title="CREATED", goes=6),
)

NO_CHECKPOINT = (
    "The job has no checkpoint. One is made every 50 steps, or as `lorry jobs submit --checkpoint-every` said."
)
JobId = Annotated[str, typer.Argument(help="The job's id.")]


app.command(cls=Sectioned)(submit)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    tag: Annotated[list[str] | None, typer.Option(help="Only those with this tag. Again for more.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="Only those with KEY=VALUE. Again for more.")] = None,
    as_json: AsJson = False,
) -> None:
    """Newest first."""
    pairs = dict(pair(entry, "--metadata", "KEY=VALUE") for entry in metadata or [])
    jobs = list(client().jobs.list(limit=limit, tags=tag or (), metadata=pairs))
    if as_json:
        return output.print_json([job.raw for job in jobs])
    rows = [
        (
            j.id,
            j.status,
            j.suffix,
            j.model,
            job_view.steps(j),
            j.progress.loss,
            progress_bars.held_out_loss(j),
            output.duration(j.seconds_running or None),
            output.briefly(j.created_at),
        )
        for j in jobs
    ]
    columns = _COLUMNS
    if not any(job.suffix for job in jobs):
        at = [column.title for column in columns].index(_SUFFIX)
        columns = columns[:at] + columns[at + 1 :]
        rows = [row[:at] + row[at + 1 :] for row in rows]
    none = "There is no job yet. Start one with `lorry jobs submit MODEL TRAIN`."
    table(columns, rows, empty="No job has all of these." if tag or pairs else none)
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
    output.pairs(job_view.sheet(job, why=why, usable_rows=_usable_rows(lorry, job)))
    return None


@app.command()
def why(job_id: JobId, as_json: AsJson = False) -> None:
    """What a job waits for, in a sentence."""
    told = client().jobs.why(job_id)
    if as_json:
        output.print_json(told)
    else:
        output.console().print(output.clean(str(told.get("explanation", ""))), soft_wrap=True)


@app.command()
def watch(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB...", help="One or more ids.")],
    as_json: AsJson = False,
) -> None:
    """Draw live bars until all are done. Exit code 1 if one did not succeed."""
    progress_bars.stay(client(), job_ids, as_json=as_json)


@app.command()
def cancel(job_id: JobId, _yes: YesTaken = False, as_json: AsJson = False) -> None:
    """End a job for good."""
    _print_result(client().jobs.cancel(job_id), as_json=as_json)


@app.command()
def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Stop a job at its last checkpoint; `resume` goes on from there."""
    _print_result(client().jobs.pause(job_id), as_json=as_json)


@app.command()
def resume(job_id: JobId, as_json: AsJson = False) -> None:
    """Put a paused job back into the queue."""
    _print_result(client().jobs.resume(job_id), as_json=as_json)


@app.command()
def hold(job_id: JobId, as_json: AsJson = False) -> None:
    """Keep a job in the queue, and out of every trainer, until it is released."""
    _print_result(client().jobs.hold(job_id), as_json=as_json)


@app.command()
def release(job_id: JobId, as_json: AsJson = False) -> None:
    """Let a held job train when its turn comes."""
    _print_result(client().jobs.release(job_id), as_json=as_json)


@app.command()
def move(
    job_id: JobId,
    *,
    before: Annotated[str | None, typer.Option("--before", metavar="JOB", help="Go before this one.")] = None,
    after: Annotated[str | None, typer.Option("--after", metavar="JOB", help="Go behind this one.")] = None,
    first: Annotated[bool, typer.Option("--first", help="Go before all.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Go behind all.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a job another place among the project's jobs of its class that wait."""
    if sum((before is not None, after is not None, first, last)) != 1:
        raise typer.BadParameter("say one of --before JOB, --after JOB, --first and --last.")
    to = "first" if first else "last" if last else None
    _print_result(client().jobs.move(job_id, before=before, after=after, to=to), as_json=as_json)


@app.command()
def checkpoints(job: JobId, as_json: AsJson = False) -> None:
    """Newest first. One that is kept can be pulled, and continued, by its name."""
    found = list(client().jobs.checkpoints(job))
    if as_json:
        return output.print_json([checkpoint.raw for checkpoint in found])
    rows = [
        (
            c.fine_tuned_model_checkpoint,
            c.step_number,
            c.metrics.get("train_loss"),
            c.available,
            output.briefly(c.created_at),
        )
        for c in found
    ]
    columns = (
        Column(title="NAME"),
        Column(title="STEP"),
        Column(title="LOSS", goes=2),
        Column(title="KEPT"),
        Column(title="CREATED", goes=1),
    )
    return table(columns, rows, empty=NO_CHECKPOINT)


@app.command()
def logs(
    job_id: JobId,
    *,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only of this attempt.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only of this process of its trainer.")] = None,
    contains: Annotated[str | None, typer.Option(help="Only lines that hold this, in whichever case.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="The last so many. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """What the job's trainers printed. For what happened to it: lorry jobs events."""
    found = deque(client().jobs.logs(job_id, attempt=attempt, rank=rank, contains=contains), maxlen=limit)
    if not found and not as_json:
        output.say("Its trainers have printed nothing that is kept. What happened to it: lorry jobs events ID")
    place: tuple[int, int] | None = None
    for line in found:
        if as_json:
            output.print_json_line(line.raw)
            continue
        if place != (line.attempt, line.rank):
            place = (line.attempt, line.rank)
            output.heading(f"attempt {line.attempt}" + (f", process {line.rank}" if line.rank else ""))
        output.console().print(output.clean(line.text), soft_wrap=True)


@app.command()
def events(
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


@app.command()
def samples(job_id: JobId, as_json: AsJson = False) -> None:
    """Answers to the job's own prompts at each evaluation, the latest last."""
    lorry = client()
    found = list(lorry.jobs.samples(job_id))
    if as_json:
        return output.print_json([sample.raw for sample in found])
    if not found:
        output.say(f"{job_id} has answered no prompt yet. A job gets prompts beside a held-out file:")
        output.say("""lorry jobs submit ... --valid FILE --set 'evaluation.samples.prompts=["..."]'""")
    for step in sorted({sample.step for sample in found}):
        output.heading(f"step {step}")
        for sample in found:
            if sample.step == step:
                more = "" if sample.is_complete else " ..."
                output.console().print(output.clean(f"> {sample.prompt}\n{sample.answer}{more}\n"), soft_wrap=True)
    return None


def _usable_rows(lorry: Lorry, job: Job) -> int | None:
    """Of the training file; asked for where it is needed to say how many epochs come to max_steps."""
    if job.max_steps is None or job.progress.num_steps != job.max_steps:
        return None
    training: dict[str, Any] = lorry.jobs.data_report(job.id).get("training") or {}
    return training.get("usable_rows")


def _print_result(job: Job, *, as_json: bool) -> None:
    if as_json:
        output.print_json(job.raw)
    else:
        end = "" if job.status == "paused" or job.is_held else "."  # a dot would be taken for part of the command
        output.say(f"{job.id} is {job_view.status(job)}{end}")


def _print_event(event: JobEvent, *, as_json: bool) -> None:
    if as_json:
        output.print_json_line(event.raw)
    else:
        line = f"{output.when(event.created_at)}  {event.level:5}  {event.message}"
        output.console().print(output.clean(line), soft_wrap=True)
