"""`lorry queue` and `lorry workers`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorry.cli import output
from lorry.cli.app import client
from lorry.cli.output import AsJson


def queue(
    everything: Annotated[bool, typer.Option("--all", help="Of all projects (an operator's key only).")] = False,
    as_json: AsJson = False,
) -> None:
    """What trains and what waits, and why."""
    snapshot = client().queue.get(all_projects=everything)
    if as_json:
        return output.print_json(snapshot)
    entries: list[dict[str, Any]] = [*(snapshot.get("running") or []), *(snapshot.get("waiting") or [])]
    rows = [(e.get("id"), e.get("status"), e.get("model"), e.get("priority"), e.get("trainer_id")) for e in entries]
    return output.table(
        ("JOB", "STATUS", "MODEL", "PRIORITY", "TRAINER"), rows, empty="Nothing runs and nothing waits."
    )


def workers(as_json: AsJson = False) -> None:
    """Who trains, and what each holds resident."""
    found = list(client().workers.list())
    if as_json:
        return output.print_json([worker.raw for worker in found])
    rows = [
        (
            w.id,
            w.host,
            w.state,
            w.resident_base,
            w.trainer_id,
            ", ".join(map(str, w.devices)),
            output.when(w.last_seen_at),
        )
        for w in found
    ]
    columns = ("ID", "HOST", "STATE", "BASE", "TRAINER", "DEVICES", "SEEN")
    return output.table(columns, rows, empty="No worker is registered. `lorry up` starts one.")
