"""A sweep's leaderboard: a table, or a live view until all trials are finished."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from lorry.cli.app import EXIT_REFUSED
from lorry.cli.render import output
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorry.client import Lorry
    from lorry.models import Sweep, Trial

POLL_SECONDS = 2.0
FINISHED = ("succeeded", "failed", "cancelled")


def num_finished(sweep: Sweep) -> int:
    return sum(sweep.counts.get(status, 0) for status in FINISHED)


def facts(sweep: Sweep) -> Iterator[tuple[str, object]]:
    yield "id", sweep.id
    yield "status", sweep.status
    yield "model", sweep.model
    yield "search", _search(sweep)
    yield "objective", f"{sweep.objective.get('goal')} {sweep.objective.get('metric')}"
    yield "trials", _trials(sweep)
    yield "created", output.when(sweep.created_at or None)
    yield "finished", output.when(sweep.finished_at)
    if sweep.best_trial is not None:
        yield "best finished" if not sweep.is_final else "best", _best(sweep.best_trial)
    yield "adapter", sweep.fine_tuned_model
    if sweep.error is not None:
        yield "stopped creating trials", sweep.error.message


def print_board(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Print the trials, best first."""
    table(_board(sweep, trials), trials, empty="No trials yet.")


def _board(sweep: Sweep, trials: Sequence[Trial]) -> list[Column]:
    paths = list(dict.fromkeys(path for trial in trials for path in trial.parameters))
    return [
        Column("TRIAL", "number"),
        *(Column(title, _parameter(path), min_width=10) for title, path in zip(_short(paths), paths, strict=True)),
        Column(str(sweep.objective.get("metric") or "value").upper(), "value"),
        Column("STEP", _steps, priority=3),
        Column("STATUS", _status),
        Column("RUNG", "rung", priority=4),
        Column("JOB", "id", priority=2),
    ]


def _parameter(path: str) -> Callable[[Trial], object]:
    return lambda trial: trial.parameters.get(path)


def watch_until_final(lorry: Lorry, sweep_id: str, *, as_json: bool) -> None:
    """Watch until all trials are finished; exits with 1 if none succeeded. Ctrl-C stops only the watching."""
    try:
        sweep = _watch(lorry, sweep_id, as_json=as_json)
    except KeyboardInterrupt:
        output.echo(f"Stopped watching; the sweep continues. Watch again with: lorry sweeps watch {sweep_id}")
        raise
    if sweep.status != "succeeded":
        raise typer.Exit(EXIT_REFUSED)


def _watch(lorry: Lorry, sweep_id: str, *, as_json: bool) -> Sweep:
    if as_json:
        return _print_changes(lorry, sweep_id, lambda sweep: sweep.raw, output.print_json_line)
    sweep = _drawn(lorry, sweep_id) if sys.stderr.isatty() else _print_changes(lorry, sweep_id, _progress, output.echo)
    print_board(sweep, list(lorry.sweeps.trials(sweep_id)))
    if sweep.fine_tuned_model:
        output.echo(f"The best adapter is {sweep.fine_tuned_model}. Pull it with: lorry adapters pull {sweep.id}")
    else:
        output.echo(f"Sweep {sweep.id} {sweep.status} and has no adapter.")
    return sweep


def _print_changes(lorry: Lorry, sweep_id: str, view: Callable[[Sweep], Any], show: Callable[[Any], None]) -> Sweep:
    """Print a line whenever this view of the sweep changes, for programs, logs and pipes."""
    last: list[Any] = []

    def print_change(sweep: Sweep) -> None:
        if last != [view(sweep)]:
            last[:] = [view(sweep)]
            show(last[0])

    return lorry.sweeps.wait(sweep_id, on_progress=print_change, poll_seconds=POLL_SECONDS)


def _progress(sweep: Sweep) -> str:
    return f"{sweep.id}  {_trials(sweep)}" + (f"  best: {_best(sweep.best_trial)}" if sweep.best_trial else "")


def _drawn(lorry: Lorry, sweep_id: str) -> Sweep:
    """Show the live leaderboard, without the last two columns."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(console=output.messages(), refresh_per_second=4, transient=True) as live:

        def draw(sweep: Sweep) -> None:
            trials = list(lorry.sweeps.trials(sweep_id, limit=max(3, live.console.height - 6)))
            columns = _board(sweep, trials)[:-2]
            title = Text(f"{sweep.id}  {_trials(sweep)}")
            drawn = Table(box=None, pad_edge=False, title=title, title_justify="left")
            for column in columns:
                drawn.add_column(Text(column.title), no_wrap=True, overflow="ellipsis")
            for trial in trials:
                drawn.add_row(*(Text(output.clean(output.cell(column.of(trial)))) for column in columns))
            live.update(drawn)

        return lorry.sweeps.wait(sweep_id, on_progress=draw, poll_seconds=POLL_SECONDS)


def _short(paths: Sequence[str]) -> list[str]:
    """Return the last name of each path, if that is unique."""
    names = [path.rpartition(".")[2] for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _status(trial: Trial) -> str:
    """Return the phase of a running trial that does not train at the moment, else its status."""
    if trial.status == "running" and trial.phase in ("loading", "verifying"):
        return trial.phase
    return "pruned" if trial.reason == "pruned" else trial.status


def _steps(trial: Trial) -> str:
    total = trial.progress.num_steps
    return f"{trial.progress.step}/{total}" if total else "-"


def _trials(sweep: Sweep) -> str:
    counts = ", ".join(f"{number} {status}" for status, number in sorted(sweep.counts.items()))
    return f"{num_finished(sweep)} of {sweep.num_trials} finished" + (f" ({counts})" if counts else "")


def _best(trial: Trial) -> str:
    values = ", ".join(f"{path}={output.cell(value)}" for path, value in trial.parameters.items())
    return f"trial {trial.number}, {output.cell(trial.value)} with {values}"


def _search(sweep: Sweep) -> str:
    search = sweep.search
    text = f"{search.get('type')}, seed {search.get('seed')}"
    if search.get("min_steps"):
        text += f"; rungs from step {search['min_steps']}, the best 1 of {search['reduction_factor']} continue"
    return text
