"""`lorry workers`: who trains, and who is to take no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import CommandGroup, client
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.models.jobs import Worker

app = typer.Typer(
    cls=CommandGroup,
    help="Who trains, and what each holds resident; cordon, uncordon and drain one.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
WorkerId = Annotated[str, typer.Argument(help="The worker's id, as in the list.")]


@app.callback()
def _workers(ctx: typer.Context, as_json: AsJson = False) -> None:  # pyright: ignore[reportUnusedFunction]
    """Who trains, and what each holds resident; cordon, uncordon and drain one."""
    if ctx.invoked_subcommand is None:
        list_workers(as_json=as_json)


@app.command("list")
def list_workers(as_json: AsJson = False) -> None:
    """Who trains, and what each holds resident. The same as `lorry workers`."""
    found = list(client().workers.list())
    if as_json:
        return output.print_json([worker.raw for worker in found])
    rows = [
        (
            worker.id,
            _state(worker),
            worker.host,
            ", ".join(map(_device, worker.devices)),
            ", ".join(worker.resident_base_names) or worker.resident_base,
            worker.trainer_id,
            output.lately(worker.last_seen_at),
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
    table(
        columns,
        rows,
        empty="No worker is registered. `lorry worker` starts one on its node, `lorry up` a whole service.",
    )
    for worker in found:
        if worker.cordon is not None and worker.state != "ended":
            by = "the service's doing" if worker.cordon.by == "service" else "an operator's wish"
            output.say(f"{worker.id} takes no new job ({by}): {worker.cordon.reason or 'no reason was given.'}")
    return None


@app.command()
def cordon(
    worker_id: WorkerId,
    reason: Annotated[str | None, typer.Option("--reason", help="Why, for whoever asks. Every key sees it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let it finish what it holds and take nothing new (an operator's key only).

    What starts in its place, on this host with these devices, takes nothing either.
    """
    worker = client().workers.cordon(worker_id, reason=reason)
    _print_result(worker, f"It takes no new job. Take that back: lorry workers uncordon {worker.id}", as_json=as_json)


@app.command()
def uncordon(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Let it take jobs again (an operator's key only)."""
    worker = client().workers.uncordon(worker_id)
    _print_result(worker, f"{worker.id} takes jobs again.", as_json=as_json)


@app.command()
def drain(worker_id: WorkerId, as_json: AsJson = False) -> None:
    """Have it save its jobs, give them back and end (an operator's key only). Their attempts don't count.

    What starts in its place takes no job before you uncordon it.
    """
    worker = client().workers.drain(worker_id)
    told = "It saves what it holds and ends. What starts in its place is cordoned: lorry workers uncordon ID"
    _print_result(worker, told, as_json=as_json)


def _print_result(worker: Worker, sentence: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json(worker.raw)
    else:
        output.say(sentence)


def _state(worker: Worker) -> str:
    is_shown = worker.cordon is not None and worker.state not in ("draining", "ended")
    return f"{worker.state}, cordoned" if is_shown else worker.state


def _device(device: Any) -> str:
    """A device's name, in whichever form the service tells it."""
    return str(device.get("name") or device) if isinstance(device, dict) else str(device)  # pyright: ignore
