"""`lorry audit`: who changed what, and whether the log of it is complete and unchanged."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.app import EXIT_REFUSED, client, group
from lorry.cli.commands.keys import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table
from lorry.errors import InvalidRequest

if TYPE_CHECKING:
    from lorry.models.accounts import AuditEvent, AuditVerification

DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
app = group("The audit log: who changed what.")


@app.command("list")
def list_(
    *,
    kind: Annotated[
        list[str] | None, typer.Option("--type", help="Such as job.cancelled; may be repeated.", metavar="TYPE")
    ] = None,
    actor: Annotated[list[str] | None, typer.Option(help="Id of a key; may be repeated.")] = None,
    project: Annotated[list[str] | None, typer.Option(help="Id of a project; may be repeated.")] = None,
    since: Annotated[int | None, duration("How far back: 12h, 30d. Left out: all.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """What was changed of late: of your project; for operators, of all."""
    started = None if since is None else time.time() - since
    found = client().audit.list(types=kind or (), actor_ids=actor or (), project_ids=project or (), since=started)
    with _suggesting_types(kind or []):
        events = list(islice(found, limit))
    if as_json:
        return output.print_json([event.raw for event in events])
    columns = (
        Column(title="WHEN"),
        Column(title="WHAT"),
        Column(title="ABOUT", narrowest=16),
        Column(title="BY", goes=1, narrowest=12),
        Column(title="FROM", goes=3),
        Column(title="DETAILS", goes=2, narrowest=16),
    )
    return table(columns, map(_row, events), empty="Nothing was changed, or not by whom and when you say.")


@app.command()
def verify(*, as_json: AsJson = False) -> None:
    """Have the server verify every event of the log and the chain's anchors (an operator's key only)."""
    found = client().audit.verify()
    if as_json:
        output.print_json({**found.raw, "is_sound": found.is_sound, "num_events": found.num_events})
    elif found.misfit is None:
        output.say(f"{found.num_events} events are as they were sealed; {found.num_unsealed} are not sealed yet.")
    else:
        output.say(_misfit_sentence(found))
    if not found.is_sound:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def export() -> None:
    """Write every sealed event to stdout, one a line (an operator's key only).

    The server's `python -m api verify-export FILE` verifies it.
    """
    for event in client().audit.export():
        sys.stdout.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")


@contextmanager
def _suggesting_types(typed: Sequence[str]) -> Generator[None]:
    """A refusal that lists every type there is tells the nearest one instead, or those of the group that was typed."""
    try:
        yield
    except InvalidRequest as error:
        field, _, index = (error.param or "").rpartition(".")
        known = re.findall(r"'([a-z_]+\.[a-z_]+)'", error.message)
        if field == "event_types[]" and index.isdecimal() and int(index) < len(typed) and known:
            error.message = f"There is no type {typed[int(index)]!r}."
            error.remedy = _near(typed[int(index)], known)
            error.param = "--type"
        raise


def _near(typed: str, known: Sequence[str]) -> str:
    group = typed.partition(".")[0]
    if typed not in (group, f"{group}.*") and (near := get_close_matches(typed, known, n=1)):
        return f"Did you mean {near[0]}?"
    of_group = [name for name in known if name.partition(".")[0] == group]
    if of_group:
        return f"Those of {group} are {', '.join(of_group)}."
    groups = sorted({name.partition(".")[0] for name in known})
    told = ", ".join(f"{name}.*" for name in groups)
    return f"Types are named {told}. Those of one: lorry audit list --type {groups[0]}"


def _misfit_sentence(found: AuditVerification) -> str:
    assert found.misfit is not None
    if found.misfit.fault == "anchor_changed":
        return (
            f"The anchor {found.misfit.id} is not what the server wrote. All {found.num_events} events fit each other."
        )
    what = {
        "changed": "is not what was sealed: its content or its digest was changed",
        "missing": "is missing",
        "misplaced": "does not follow the one before it: events were exchanged, or the end was cut off",
    }
    named = f" ({found.misfit.id})" if found.misfit.id else ""
    told = what.get(found.misfit.fault, found.misfit.fault)
    return f"Event {found.misfit.link}{named} {told}. {found.num_events} before it fit."


def _detail(name: str, value: object) -> str:
    if name.endswith("_at") and isinstance(value, int | float):
        return str(output.when(int(value)))
    return output.cell(value)


def _row(event: AuditEvent) -> tuple[object, ...]:
    by = event.actor.get("name") or event.actor.get("type")
    details = " ".join(f"{name}={_detail(name, value)}" for name, value in event.details.items() if value is not None)
    details = DIGEST.sub(r"\1…", details)
    return output.briefly(int(event.effective_at)), event.type, event.object_id, by, event.address, details
