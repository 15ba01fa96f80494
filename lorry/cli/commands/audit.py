"""`lorry audit`: list, verify and export the audit log."""

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

from lorry.cli import lookup
from lorry.cli.app import EXIT_REFUSED, client, group
from lorry.cli.parsing.durations import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet
from lorry.cli.render.tables import Column, listing
from lorry.errors import InvalidRequest

if TYPE_CHECKING:
    from lorry.models import AuditEvent, AuditVerification

DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
app = group("Query, verify and export the audit log.")


@app.verb(
    "list",
    "lorry audit list",
    "lorry audit list --type job.cancelled --since 7d",
    "lorry audit list --actor key-3f2b --json",
)
def list_(
    *,
    kind: Annotated[
        list[str] | None,
        typer.Option("--type", help="Show only this event type, such as job.cancelled (repeatable).", metavar="TYPE"),
    ] = None,
    actor: Annotated[
        list[str] | None,
        typer.Option(help="Show only events caused by this API key, by ID (repeatable).", metavar="KEY"),
    ] = None,
    project: Annotated[
        list[str] | None, typer.Option(help="Show only events of this project, by ID (repeatable).")
    ] = None,
    since: Annotated[
        int | None, duration("Show only events within this period, such as 12h or 30d (default: all).")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Maximum number of events to list.", min=1)] = 50,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List recent events, newest first: of your project or, with an operator key, of all projects."""
    started = None if since is None else time.time() - since
    lorry = client()
    actors = [lookup.key(lorry, typed) for typed in actor or ()]
    projects = [lookup.project(lorry, typed) for typed in project or ()]
    found = lorry.audit.list(types=kind or (), actor_ids=actors, project_ids=projects, since=started)
    with _suggesting_types(kind or []):
        events = list(islice(found, limit))
    columns = (
        Column("WHEN", lambda event: output.briefly(int(event.effective_at))),
        Column("WHAT", "type"),
        Column("ABOUT", "object_id", min_width=16),
        Column("BY", lambda event: event.actor.get("name") or event.actor.get("type"), priority=1, min_width=12),
        Column("FROM", "address", priority=3),
        Column("DETAILS", _details, priority=2, min_width=16),
    )
    listing(events, columns, empty="No matching events.", as_json=as_json, quiet=quiet)


@app.verb("verify", "lorry audit verify", "lorry audit verify --json")
def verify(*, as_json: AsJson = False) -> None:
    """Verify the audit log's hash chain and its anchors on the server (operator key required).

    Exits with 1 if it fails.
    """
    found = client().audit.verify()
    if as_json:
        output.print_json({**found.raw, "is_sound": found.is_sound, "num_events": found.num_events})
    elif found.misfit is None:
        output.echo(f"OK: {found.num_events} sealed events are unchanged; {found.num_unsealed} are not sealed yet.")
    else:
        output.echo(_misfit_sentence(found))
    if not found.is_sound:
        raise typer.Exit(EXIT_REFUSED)


@app.verb("export", "lorry audit export > audit.jsonl", "lorry audit export | gzip > audit.jsonl.gz")
def export() -> None:
    """Write every sealed event to stdout, one JSON object per line (operator key required).

    On the server, `python -m api verify-export FILE` verifies the output.
    """
    for event in client().audit.export():
        sys.stdout.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")


@contextmanager
def _suggesting_types(typed: Sequence[str]) -> Generator[None]:
    """Replace an error that lists every event type: suggest the nearest type, or the types of the same group."""
    try:
        yield
    except InvalidRequest as error:
        field, _, index = (error.param or "").rpartition(".")
        known = re.findall(r"'([a-z_]+\.[a-z_]+)'", error.message)
        if field == "event_types[]" and index.isdecimal() and int(index) < len(typed) and known:
            error.message = f"Unknown event type {typed[int(index)]!r}."
            error.remedy = _suggestion(typed[int(index)], known)
            error.param = "--type"
        raise


def _suggestion(typed: str, known: Sequence[str]) -> str:
    group = typed.partition(".")[0]
    if typed not in (group, f"{group}.*") and (matches := get_close_matches(typed, known, n=1)):
        return f"Did you mean {matches[0]}?"
    of_group = [name for name in known if name.partition(".")[0] == group]
    if of_group:
        return f"Event types of {group}: {', '.join(of_group)}."
    groups = sorted({name.partition(".")[0] for name in known})
    shown = ", ".join(f"{name}.*" for name in groups)
    return f"Groups of event types: {shown}. List the types of a group: lorry audit list --type {groups[0]}"


def _misfit_sentence(found: AuditVerification) -> str:
    assert found.misfit is not None
    if found.misfit.fault == "anchor_changed":
        return (
            f"FAILED: anchor {found.misfit.id} is not what the server wrote. "
            f"All {found.num_events} events match the chain."
        )
    fault_texts = {
        "changed": "was changed after it was sealed",
        "missing": "is missing",
        "misplaced": "does not follow the previous event: events were swapped, or the end was cut off",
    }
    named = f" ({found.misfit.id})" if found.misfit.id else ""
    fault = fault_texts.get(found.misfit.fault, found.misfit.fault)
    return f"FAILED: event {found.misfit.link}{named} {fault}. The {found.num_events} events before it match the chain."


def _detail(name: str, value: object) -> str:
    if name.endswith("_at") and isinstance(value, int | float):
        return str(output.when(int(value)))
    return output.cell(value)


def _details(event: AuditEvent) -> str:
    details = " ".join(f"{name}={_detail(name, value)}" for name, value in event.details.items() if value is not None)
    return DIGEST.sub(r"\1…", details)
