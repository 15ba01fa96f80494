"""`lorry queue` and `lorry workers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import output
from lorry.cli.app import client
from lorry.cli.output import AsJson
from lorry.cli.tables import Column, table
from lorry.errors import PermissionDenied

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models import Worker


def queue(
    everything: Annotated[bool, typer.Option("--all", help="Of all projects (an operator's key only).")] = False,
    as_json: AsJson = False,
) -> None:
    """What trains and what waits, and why."""
    snapshot = client().queue.get(all_projects=everything)
    if as_json:
        return output.print_json(snapshot)
    entries: list[dict[str, Any]] = snapshot.get("jobs") or []
    shown = ("job_id", "state", "base_model", "priority", "position", "trainer_id", "reason")
    rows = [tuple(entry.get(name) for name in shown) for entry in entries]
    columns = (
        Column(title="JOB"),
        Column(title="STATE"),
        Column(title="BASE", goes=2, narrowest=12),
        Column(title="PRIORITY", goes=3),
        Column(title="PLACE", goes=1),
        Column(title="TRAINER", goes=4),
        Column(title="WHY ITS TURN", narrowest=20),
    )
    return table(columns, rows, empty="Nothing runs and nothing waits.")


def workers(as_json: AsJson = False) -> None:
    """Who trains, and what each holds resident."""
    lorry = client()
    found = list(lorry.workers.list())
    if as_json:
        return output.print_json([worker.raw for worker in found])
    engaged = _engaged(lorry) if any(worker.state == "busy" for worker in found) else None
    rows = [
        (
            worker.id,
            _state(worker, engaged),
            worker.host,
            ", ".join(map(_device, worker.devices)),
            ", ".join(worker.resident_base_names) or worker.resident_base,
            worker.trainer_id,
            output.briefly(worker.last_seen_at),
        )
        for worker in found
    ]
    columns = (
        Column(title="ID"),
        Column(title="STATE"),
        Column(title="HOST", goes=4),
        Column(title="DEVICES", goes=2, narrowest=12),
        Column(title="HOLDS", goes=1, narrowest=12),
        Column(title="TRAINER", goes=5),
        Column(title="SEEN", goes=3),
    )
    return table(columns, rows, empty="No worker is registered. `lorry up` starts one.")


def _engaged(lorry: Lorry) -> set[str] | None:
    """Ids of the workers that have a job; None where the key may not see every project's jobs."""
    try:
        entries: list[dict[str, Any]] = lorry.queue.get(all_projects=True).get("jobs") or []
    except PermissionDenied:
        return None
    return {entry["worker_id"] for entry in entries if entry.get("worker_id")}


def _state(worker: Worker, engaged: set[str] | None) -> str:
    """The service calls a worker busy as long as its trainer lives, and that outlives its jobs."""
    if worker.state == "busy" and engaged is not None and worker.id not in engaged:
        return "idle (base loaded)"
    return worker.state


def _device(device: Any) -> str:
    """A device's name, in whichever form the service tells it."""
    return str(device.get("name") or device) if isinstance(device, dict) else str(device)  # pyright: ignore
