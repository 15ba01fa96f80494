"""`lorry queue` and `lorry status`: jobs and workers of a service."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import client
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Iterable

QUEUE_EXAMPLES = ("lorry queue", "lorry queue --all --json")
STATUS_EXAMPLES = ("lorry status", "lorry status -o json")


def queue(
    everything: Annotated[
        bool, typer.Option("--all", help="Show the jobs of all projects (operator key required).")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show running and queued jobs, with the reason for their order."""
    snapshot = client().queue.get(all_projects=everything)
    entries: list[dict[str, Any]] = snapshot.get("jobs") or []
    if as_json:
        return output.print_json(snapshot)
    if quiet:
        return output.print_ids(str(entry.get("job_id")) for entry in entries)
    columns = (
        Column("JOB", "job_id"),
        Column("STATE", "state"),
        Column("BASE", "base_model", priority=2, min_width=12),
        Column("PRIORITY", "priority", priority=3),
        Column("POSITION", "position", priority=1),
        Column("TRAINER", "trainer_id", priority=4),
        Column("REASON", "reason", min_width=20),
    )
    return table(columns, entries, empty="No running or queued jobs.")


def status(as_json: AsJson = False) -> None:
    """Show the address of the service, its live workers and its jobs. Exits with 1 if it does not respond."""
    from lorry import connection
    from lorry.local import lock

    lorry = client()
    entries: list[dict[str, Any]] = lorry.queue.get().get("jobs") or []
    jobs = Counter(str(entry.get("state")) for entry in entries)
    workers = Counter(worker.state for worker in lorry.workers.list() if worker.state != "ended")
    folder = connection.default_data_dir()
    pid = lock.holder(folder)
    if as_json:
        return output.print_json({"url": lorry.url, "jobs": jobs, "workers": workers, "data_dir_pid": pid})
    origin = connection.find().origin.removeprefix("The address comes from ").rstrip(".")
    output.pairs(
        (
            ("service", lorry.url),
            ("address from", origin),
            ("jobs", _counts(jobs.items()) or "none running or queued"),
            ("workers", _counts(workers.items()) or "none"),
            ("local service", f"process {pid} in {folder}" if pid is not None else f"not running in {folder}"),
        )
    )
    return None


def _counts(numbers: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(numbers))
