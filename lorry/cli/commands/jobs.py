"""`lorry jobs`: submit, inspect and control fine-tuning jobs."""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.commands.submit import submit
from lorry.cli.parsing.option_values import pair
from lorry.cli.render import job_view, output, progress_bars
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorry.client import Lorry
    from lorry.models import Job, JobEvent, LogLine

app = group("Submit, inspect and control fine-tuning jobs.")

_COLUMNS = (
    Column("ID", "id"),
    Column("STATUS", "status"),
    Column("SUFFIX", "suffix", priority=3, min_width=8, is_optional=True),
    Column("MODEL", "model", priority=4, min_width=10),
    Column("STEP", job_view.steps),
    Column("LOSS", lambda job: job.progress.loss, priority=2),
    Column("VALID", progress_bars.validation_loss, priority=1),
    Column("TOOK", lambda job: output.duration(job.seconds_running or None), priority=5),
    Column("CREATED", date("created_at"), priority=6),
)
NO_CHECKPOINT = (
    "The job has no checkpoint yet. Jobs write one every 50 steps, or as set with `lorry jobs submit "
    "--checkpoint-every`."
)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="ID of the job, or a unique prefix of it.")]
Last = Annotated[
    int | None, typer.Option("--limit", "-n", min=1, help="Show only the last N lines (default: all).", metavar="N")
]


class Curve(StrEnum):
    """The curves of a job."""

    train = "train"
    valid = "valid"


app.verb(
    "submit",
    "lorry jobs submit smollm2 chats.jsonl --suffix support",
    "lorry jobs submit smollm2 chats.jsonl --valid valid.jsonl --rank 32 --epochs 3 --watch",
    "lorry jobs submit -m smollm2 -F file-3f2b --method dpo --beta 0.2",
)(submit)


@app.verb("list", "lorry jobs list", "lorry jobs list --tag nightly --limit 100", "lorry jobs list -q -n 5")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of jobs to list.")] = 20,
    tag: Annotated[list[str] | None, typer.Option(help="Show only jobs with this tag (repeatable).")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="Show only jobs with this metadata (repeatable).", metavar="KEY=VALUE"),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    pairs = dict(pair(entry, "--metadata", "KEY=VALUE") for entry in metadata or [])
    jobs = client().jobs.list(limit=limit, tags=tag or (), metadata=pairs)
    empty = "No jobs match." if tag or pairs else "No jobs yet. Submit one with `lorry jobs submit MODEL TRAIN`."
    if any(job.status == "paused" for job in listing(jobs, _COLUMNS, empty=empty, as_json=as_json, quiet=quiet)):
        output.echo("Resume a paused job with: lorry jobs resume ID")


@app.verb("show", "lorry jobs show ftjob-3f2b", "lorry jobs show ftjob-3f2b -o json")
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job's details."""
    lorry = client()
    job_id = lookup.job(lorry, job_id)
    job = lorry.jobs.get(job_id)
    if as_json:
        return output.print_json(job.raw)
    waits = job.status in {"queued", "validating_files"}
    why = lorry.jobs.why(job_id).get("explanation") if waits else None
    output.pairs(job_view.sheet(job, why=why, usable_rows=_usable_rows(lorry, job)))
    return None


@app.verb("why", "lorry jobs why ftjob-3f2b", "lorry jobs why ftjob-3f2b --json")
def why(job_id: JobId, as_json: AsJson = False) -> None:
    """Explain why a job is waiting."""
    lorry = client()
    found = lorry.jobs.why(lookup.job(lorry, job_id))
    if as_json:
        output.print_json(found)
    else:
        output.console().print(output.clean(str(found.get("explanation", ""))), soft_wrap=True)


@app.verb(
    "watch",
    "lorry jobs watch ftjob-3f2b",
    "lorry jobs watch ftjob-3f2b ftjob-77aa",
    "lorry jobs watch ftjob-3f2b --json",
)
def watch(
    job_ids: Annotated[
        list[str], typer.Argument(metavar="JOB...", help="IDs of one or more jobs, or unique prefixes of them.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show live progress until all jobs are finished. Exits with 1 if a job did not succeed."""
    lorry = client()
    progress_bars.watch_until_final(lorry, [lookup.job(lorry, typed) for typed in job_ids], as_json=as_json)


@app.verb(
    "logs",
    "lorry jobs logs ftjob-3f2b",
    "lorry jobs logs ftjob-3f2b -f",
    "lorry jobs logs ftjob-3f2b -n 50 --contains error",
)
def logs(
    job_id: JobId,
    *,
    attempt: Annotated[int | None, typer.Option(min=1, help="Show only this attempt (default: all).")] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Show only this process of the trainer (default: all).")
    ] = None,
    contains: Annotated[
        str | None, typer.Option(help="Show only lines that contain this text, ignoring case.", metavar="TEXT")
    ] = None,
    limit: Last = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the job is finished; up to a minute late.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the job's trainers printed. For what happened to the job, see `lorry jobs events`."""
    lorry = client()
    job_id = lookup.job(lorry, job_id)

    def printed() -> Iterable[LogLine]:
        return lorry.jobs.logs(job_id, attempt=attempt, rank=rank, contains=contains)

    found = deque(printed(), maxlen=None if follow else limit)
    place = _print_lines(list(found)[-(limit or 0) :], as_json=as_json)
    if not follow:
        if not found and not as_json:
            output.echo(f"No logs for job {job_id}. For what happened to it, run: lorry jobs events {job_id}")
        return
    seen = {line.id for line in found}  # the last id is no cursor: lines of several processes arrive interleaved

    def print_new(_job: object) -> None:
        nonlocal place
        new = [line for line in printed() if line.id not in seen]
        seen.update(line.id for line in new)
        place = _print_lines(new, as_json=as_json, place=place)

    print_new(lorry.jobs.wait(job_id, on_progress=print_new, poll_seconds=FOLLOW_SECONDS))


FOLLOW_SECONDS = 10.0
"""Between two requests of `logs -f`. Workers upload logs at most once a minute."""


def _print_lines(
    lines: Iterable[LogLine], *, as_json: bool, place: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Print a heading for each change of attempt or process. Returns the last one; `place` is the previous one."""
    for line in lines:
        if as_json:
            output.print_json_line(line.raw)
            continue
        if place != (line.attempt, line.rank):
            place = (line.attempt, line.rank)
            output.heading(f"attempt {line.attempt}" + (f", process {line.rank}" if line.rank else ""))
        output.console().print(output.clean(line.text), soft_wrap=True)
    return place


@app.verb(
    "events",
    "lorry jobs events ftjob-3f2b",
    "lorry jobs events ftjob-3f2b -f",
    "lorry jobs events ftjob-3f2b -n 20 --metrics",
)
def events(
    job_id: JobId,
    limit: Last = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until the job is finished.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Include the loss of each step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a job's events, oldest first."""
    lorry = client()
    job_id = lookup.job(lorry, job_id)
    past = list(lorry.jobs.events(job_id, type=None if metrics else "message", limit=limit))
    for event in reversed(past):
        _print_event(event, as_json=as_json)
    if follow:
        for update in lorry.jobs.follow(job_id, after_event=past[0].id if past else None):
            if update.event is not None and (metrics or update.event.type != "metrics"):
                _print_event(update.event, as_json=as_json)


@app.verb(
    "metrics",
    "lorry jobs metrics ftjob-3f2b",
    "lorry jobs metrics ftjob-3f2b --kind valid",
    "lorry jobs metrics ftjob-3f2b --json",
)
def metrics(
    job_id: JobId,
    kind: Annotated[Curve, typer.Option(help="Curve to show: training or validation.")] = Curve.train,
    as_json: AsJson = False,
) -> None:
    """Show a job's loss curve by step; long curves are thinned to 2,000 points."""
    lorry = client()
    found = lorry.jobs.metrics(lookup.job(lorry, job_id), kind=kind.value)
    if as_json:
        return output.print_json(found)
    names = ("step", "loss", "token_accuracy", "learning_rate", "grad_norm", "num_tokens")
    shown = [name for name in names if any(point.get(name) is not None for point in found)]
    columns = [Column(name.removeprefix("num_").replace("_", " ").upper(), name) for name in shown]
    return table(columns, found, empty="No metrics for this job yet.")


@app.verb("samples", "lorry jobs samples ftjob-3f2b", "lorry jobs samples ftjob-3f2b --json")
def samples(job_id: JobId, as_json: AsJson = False) -> None:
    """Show the answers to the job's sample prompts at each evaluation, latest last."""
    lorry = client()
    job_id = lookup.job(lorry, job_id)
    found = list(lorry.jobs.samples(job_id))
    if as_json:
        return output.print_json([sample.raw for sample in found])
    if not found:
        output.echo(
            f"No samples for job {job_id} yet. A job generates samples if it has a validation file and prompts:"
        )
        output.echo("""lorry jobs submit ... --valid FILE --set 'evaluation.samples.prompts=["..."]'""")
    for step in sorted({sample.step for sample in found}):
        output.heading(f"step {step}")
        for sample in found:
            if sample.step == step:
                more = "" if sample.is_complete else " ..."
                output.console().print(output.clean(f"> {sample.prompt}\n{sample.answer}{more}\n"), soft_wrap=True)
    return None


@app.verb("checkpoints", "lorry jobs checkpoints ftjob-3f2b", "lorry jobs checkpoints ftjob-3f2b -q")
def checkpoints(job_id: JobId, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List a job's checkpoints, newest first. A kept checkpoint can be pulled and continued by its name."""
    lorry = client()
    columns = (
        Column("NAME", "fine_tuned_model_checkpoint"),
        Column("STEP", "step_number"),
        Column("LOSS", lambda checkpoint: checkpoint.metrics.get("train_loss"), priority=2),
        Column("KEPT", "available"),
        Column("CREATED", date("created_at"), priority=1),
    )
    found = lorry.jobs.checkpoints(lookup.job(lorry, job_id))
    listing(found, columns, empty=NO_CHECKPOINT, as_json=as_json, quiet=quiet)


@app.verb("cancel", "lorry jobs cancel ftjob-3f2b", "lorry jobs cancel ftjob-3f2b --yes")
def cancel(job_id: JobId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Cancel a job. It can't be resumed."""
    lorry = client()
    job_id = lookup.job(lorry, job_id)
    output.confirm(f"Cancel job {job_id}? It can't be resumed.", yes=yes)
    _print_result(lorry.jobs.cancel(job_id), as_json=as_json)


def _verb(name: str, help_text: str) -> None:
    """Add a command that only sends the verb of the same name."""

    def run(job_id: JobId, as_json: AsJson = False) -> None:
        lorry = client()
        _print_result(getattr(lorry.jobs, name)(lookup.job(lorry, job_id)), as_json=as_json)

    run.__doc__ = help_text
    app.verb(name, f"lorry jobs {name} ftjob-3f2b", f"lorry jobs {name} ftjob-3f2b --json")(run)


_verb("pause", "Pause a job. `lorry jobs resume` continues it where it stopped.")
_verb("resume", "Return a paused job to the queue.")
_verb("hold", "Hold a queued job: it keeps its position but won't start until released.")
_verb("release", "Release a held job, so that it can start.")


@app.verb("move", "lorry jobs move ftjob-3f2b --first", "lorry jobs move ftjob-3f2b --after ftjob-77aa")
def move(
    job_id: JobId,
    *,
    before: Annotated[str | None, typer.Option("--before", metavar="JOB", help="Move before this job.")] = None,
    after: Annotated[str | None, typer.Option("--after", metavar="JOB", help="Move after this job.")] = None,
    first: Annotated[bool, typer.Option("--first", help="Move to the front.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Move to the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change a job's position among the project's queued jobs of the same priority."""
    if sum((before is not None, after is not None, first, last)) != 1:
        raise typer.BadParameter("pass exactly one of --before JOB, --after JOB, --first and --last.")
    lorry = client()
    job_id = lookup.job(lorry, job_id)
    before, after = (one and lookup.job(lorry, one) for one in (before, after))
    to = "first" if first else "last" if last else None
    _print_result(lorry.jobs.move(job_id, before=before, after=after, to=to), as_json=as_json)


def _usable_rows(lorry: Lorry, job: Job) -> int | None:
    """Return the usable rows of the training file; requested only if `max_steps` limits the number of epochs."""
    if job.max_steps is None or job.progress.num_steps != job.max_steps:
        return None
    training: dict[str, Any] = lorry.jobs.data_report(job.id).get("training") or {}
    return training.get("usable_rows")


def _print_result(job: Job, *, as_json: bool) -> None:
    end = "" if job.status == "paused" or job.is_held else "."  # a period would look like part of the command
    output.print_result(job, f"Job {job.id} is {job_view.status(job)}{end}", as_json=as_json)


def _print_event(event: JobEvent, *, as_json: bool) -> None:
    if as_json:
        output.print_json_line(event.raw)
    else:
        line = f"{output.when(event.created_at)}  {event.level:5}  {event.message}"
        output.console().print(output.clean(line), soft_wrap=True)
