"""`lorry workers`: list, cordon and drain workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet
from lorry.cli.render.tables import Column, listing
from lorry.errors import LorryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models import Cordon, Worker

app = group("List and manage workers.")
WorkerId = Annotated[str, typer.Argument(metavar="WORKER", help="ID of the worker, or a unique prefix of it.")]


@app.verb("list", "lorry workers list", "lorry workers list -o json", "lorry workers list -q")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List workers with their state, devices and loaded base model."""
    columns = (
        Column("ID", "id"),
        Column("STATE", _state),
        Column("HOST", "host", priority=4),
        Column("DEVICES", _devices, priority=2, min_width=12),
        Column("BASE", _base, priority=1, min_width=12),
        Column("TRAINER", "trainer_id", priority=5),
        Column("LAST SEEN", lambda worker: output.recent(worker.last_seen_at), priority=3),
    )
    empty = "No workers are registered. Start one with `lorry worker`, or a whole service with `lorry up`."
    for worker in listing(client().workers.list(), columns, empty=empty, as_json=as_json, quiet=quiet):
        if worker.cordon is not None and worker.state != "ended":
            output.echo(_cordon_sentence(worker.id, worker.cordon))


@app.verb("show", "lorry workers show worker-3f2b", "lorry workers show worker-3f2b --json")
def show(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Show a worker's details."""
    typed = worker_id
    lorry = client()
    worker_id = lookup.worker(lorry, typed)
    worker = next((one for one in lorry.workers.list() if one.id == worker_id), None)
    if worker is None:
        raise LorryError("listed_worker_not_found", typed=typed)
    output.print_facts(worker, _facts(worker), as_json=as_json)


@app.verb(
    "cordon",
    "lorry workers cordon worker-3f2b",
    "lorry workers cordon worker-3f2b --reason 'Replacing its fan'",
)
def cordon(
    worker_id: WorkerId,
    reason: Annotated[str | None, typer.Option("--reason", help="Reason, visible to every API key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Stop a worker from accepting new jobs; it finishes its current jobs (operator key required).

    A worker that is restarted on the same host with the same devices is cordoned too.
    """
    lorry = client()
    worker = lorry.workers.cordon(lookup.worker(lorry, worker_id), reason=reason)
    undo = f"lorry workers uncordon {worker.id}"
    output.print_result(worker, f"Cordoned {worker.id}: it accepts no new jobs. Undo it with: {undo}", as_json=as_json)


@app.verb("uncordon", "lorry workers uncordon worker-3f2b", "lorry workers uncordon worker-3f2b --json")
def uncordon(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Let a cordoned worker accept jobs again (operator key required)."""
    lorry = client()
    worker = lorry.workers.uncordon(lookup.worker(lorry, worker_id))
    output.print_result(worker, f"Uncordoned {worker.id}: it accepts jobs again.", as_json=as_json)


@app.verb("drain", "lorry workers drain worker-3f2b", "lorry workers drain worker-3f2b --json")
def drain(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Stop a worker: it saves its jobs, requeues them and exits (operator key required).

    The interrupted attempts don't count as failed. The worker that replaces it is cordoned until you uncordon it.
    """
    lorry = client()
    worker = lorry.workers.drain(lookup.worker(lorry, worker_id))
    undo = "lorry workers uncordon ID"
    message = (
        f"Draining {worker.id}: it requeues its jobs and exits. Its replacement is cordoned; undo that with: {undo}"
    )
    output.print_result(worker, message, as_json=as_json)


def _cordon_sentence(worker_id: str, cordon: Cordon) -> str:
    by = "the service" if cordon.by == "service" else "an operator"
    return f"{worker_id} is cordoned by {by}: {cordon.reason or 'no reason given.'}"


def _facts(worker: Worker) -> Iterator[tuple[str, object]]:
    yield "id", worker.id
    yield "state", _state(worker)
    yield "cordoned", worker.cordon and _cordon_sentence(worker.id, worker.cordon)
    yield "host", worker.host
    yield "version", worker.version
    yield "devices", _devices(worker)
    yield "memory", output.size(worker.memory_bytes) if worker.memory_bytes else None
    yield "base model", _base(worker)
    yield "trainer", worker.trainer_id
    yield "last seen", output.when(worker.last_seen_at or None)


def _state(worker: Worker) -> str:
    is_shown = worker.cordon is not None and worker.state not in ("draining", "ended")
    return f"{worker.state}, cordoned" if is_shown else worker.state


def _devices(worker: Worker) -> str:
    return ", ".join(map(_device, worker.devices))


def _base(worker: Worker) -> str | None:
    return ", ".join(worker.resident_base_names) or worker.resident_base


def _device(device: Any) -> str:
    """Return a device's name; services of several versions return it in different forms."""
    return str(device.get("name") or device) if isinstance(device, dict) else str(device)  # pyright: ignore
