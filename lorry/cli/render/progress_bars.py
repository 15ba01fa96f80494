"""Live bars for jobs: step, loss, tokens/s and time left. One thread per job reads; the main thread draws."""

from __future__ import annotations

import sys
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING

import typer

from lorry.cli.app import EXIT_REFUSED
from lorry.cli.render import output
from lorry.errors import LorryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress, TaskID

    from lorry.client import Lorry
    from lorry.models import Job

_BAR_CELLS = 24
_CELLS_OF_ALL_FACTS = 106
"""An id of 30 and all facts next to it, for a job of several thousand steps."""
_LINES_OF_A_JOB = 10
_QUIET_SECONDS = 60.0
"""Without a terminal, a training job prints a line at each tenth of its steps, and after this time."""
Message = tuple[str, "Job | LorryError"]


def watch_until_final(lorry: Lorry, job_ids: list[str], *, as_json: bool) -> None:
    """Watch jobs, and exit with 1 if one did not succeed. Ctrl-C stops only the watching."""
    try:
        jobs = watch(lorry, job_ids, as_json=as_json)
    except KeyboardInterrupt:
        output.echo(f"Stopped watching; training continues. Watch again with: lorry jobs watch {' '.join(job_ids)}")
        raise
    if any(job.status != "succeeded" for job in jobs):
        raise typer.Exit(EXIT_REFUSED)


def watch(lorry: Lorry, job_ids: list[str], *, as_json: bool) -> list[Job]:
    """Watch until all jobs are final, and return them. With JSON, every change is one line on stdout."""
    unique = list(dict.fromkeys(job_ids))
    if as_json:
        return _drain(lorry, unique, lambda job: output.print_json_line(job.raw))
    if not sys.stderr.isatty():
        return _drain(lorry, unique, _reporting_pauses(_Lines().show, output.echo))
    with _bars() as progress:
        bars = {job_id: progress.add_task(job_id, total=None, facts="") for job_id in unique}
        above = progress.console
        show = _reporting_pauses(
            lambda job: _draw(progress, bars[job.id], job),
            lambda sentence: above.print(output.clean(sentence), soft_wrap=True),
        )
        jobs = _drain(lorry, unique, show)
    for job in jobs:
        output.echo(ending(job))
    return jobs


def ending(job: Job) -> str:
    """Return a sentence about a final job."""
    if job.status == "succeeded":
        return f"Job {job.id} succeeded: {job.fine_tuned_model}"
    reason = f": {job.error.message} {job.error.remedy}".rstrip() if job.error else "."
    return f"Job {job.id} {job.status}{reason}"


def how_to_resume(job: Job) -> str:
    return f"paused. Resume it with: lorry jobs resume {job.id}"


def facts(job: Job, *, max_width: int | None = None) -> str:
    """Return the text next to a bar. If it is wider than max_width cells, the least important facts are dropped."""
    progress = job.progress
    is_active = not job.is_final and job.status != "paused"  # else the last measurement is out of date
    parts = [(0, job.status)]
    if progress.num_steps:
        parts.append((0, f"step {progress.step}/{progress.num_steps}"))
    if progress.loss is not None:
        parts.append((1, f"loss {progress.loss:.3f}"))
    if (valid_loss := validation_loss(job)) is not None:
        parts.append((2, f"valid {valid_loss:.3f}"))
    if progress.tokens_per_second is not None and is_active:
        parts.append((4, f"{progress.tokens_per_second:,.0f} tokens/s"))
    if progress.seconds_left is not None and is_active:
        parts.append((3, f"{output.duration(progress.seconds_left)} left"))
    while max_width is not None and len(_joined(parts)) > max_width and max(parts)[0] > 0:
        parts.remove(max(parts))
    return _joined(parts)


def validation_loss(job: Job) -> float | None:
    """Return the adapter's own validation loss, once it has one; before that the latest."""
    kept = job.progress.kept_valid_loss
    return job.progress.valid_loss if kept is None else kept


def _joined(parts: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


def _reporting_pauses(show: Callable[[Job], None], echo: Callable[[str], None]) -> Callable[[Job], None]:
    """Call `show`, and print once per pause how to resume the job."""
    paused: set[str] = set()

    def shown(job: Job) -> None:
        show(job)
        if job.status != "paused":
            paused.discard(job.id)
        elif job.id not in paused:
            paused.add(job.id)
            echo(f"Job {job.id} is {how_to_resume(job)}")

    return shown


class _Lines:
    """For logs and pipes: a line at each change of a job's status, at each tenth of its steps, and once a minute."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[tuple[str, int], int, float]] = {}
        """By job: its status and the tenths of its steps, its step, and the time of the last line."""

    def show(self, job: Job) -> None:
        step, now = job.progress.step, time.monotonic()
        state = (job.status, step * _LINES_OF_A_JOB // max(1, job.progress.num_steps))
        last_state, last_step, printed_at = self._last.get(job.id, (None, None, now))
        if state != last_state or (step != last_step and now - printed_at >= _QUIET_SECONDS):
            self._last[job.id] = (state, step, now)
            output.echo(ending(job) if job.is_final else f"{job.id}  {facts(job)}")


def _drain(lorry: Lorry, job_ids: list[str], show: Callable[[Job], None]) -> list[Job]:
    """Show each new state of each job in the main thread, so that Ctrl-C works at once."""
    final: dict[str, Job] = {}
    for message in _messages(lorry, job_ids):
        job_id, state = message
        if isinstance(state, LorryError):
            raise state
        show(state)
        if state.is_final:
            final[job_id] = state
        if len(final) == len(job_ids):
            break
    return [final[job_id] for job_id in job_ids]


def _messages(lorry: Lorry, job_ids: list[str]) -> Iterator[Message]:
    if len(job_ids) == 1:  # needs no thread
        yield from ((job_ids[0], update.job) for update in lorry.jobs.follow(job_ids[0]) if update.job is not None)
        return
    inbox: SimpleQueue[Message] = SimpleQueue()
    for job_id in job_ids:
        threading.Thread(target=_follow, args=(lorry, job_id, inbox), daemon=True).start()
    while True:
        yield inbox.get()


def _follow(lorry: Lorry, job_id: str, inbox: SimpleQueue[Message]) -> None:
    try:
        for update in lorry.jobs.follow(job_id):
            if update.job is not None:
                inbox.put((job_id, update.job))
    except LorryError as error:
        inbox.put((job_id, error))


def _bars() -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn

    console = output.messages()
    bar = [BarColumn(bar_width=_BAR_CELLS)] if _fits_bars(console.width) else []
    label, detail = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[facts]}", markup=False)
    return Progress(label, *bar, detail, console=console)


def _draw(progress: Progress, bar: TaskID, job: Job) -> None:
    steps, width = job.progress, progress.console.width
    total = steps.num_steps or (1 if job.is_final else None)
    max_width = width - len(job.id) - 1 - (_BAR_CELLS + 1 if _fits_bars(width) else 0)
    progress.update(bar, completed=steps.step, total=total, facts=output.clean(facts(job, max_width=max_width)))


def _fits_bars(width: int) -> bool:
    return width >= _CELLS_OF_ALL_FACTS + _BAR_CELLS
