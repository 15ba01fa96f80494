"""`lorry queue` and `lorry sign-in-link`."""

from __future__ import annotations

import webbrowser
from typing import Annotated, Any

import typer

from lorry.cli.app import client
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table


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


def sign_in_link(
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in this machine's browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a link that signs one browser in to the dashboard, once, with the rights of your key."""
    link = client().sign_in_links.create()
    if as_json:
        output.print_json(link)
    else:
        output.console().print(link["url"], soft_wrap=True)
        output.say(f"It works once, until {output.when(link['expires_at'])}; keep it to yourself.")
    if open_browser and not webbrowser.open(link["url"]):
        output.say("There is no browser here to open it in: open the link by hand.")
