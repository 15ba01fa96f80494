"""`lorry keys`: who may do what."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorry.cli.app import client, group
from lorry.cli.parsing.option_values import Priority
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.models.accounts import ApiKey

app = group("API keys: who may do what.")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
SCOPES = frozenset(
    {
        "files:read",
        "files:write",
        "jobs:read",
        "jobs:write",
        "adapters:read",
        "adapters:write",
        "keys:read",
        "keys:write",
        "audit:read",
        "webhooks:read",
        "webhooks:write",
        "usage:read",
    }
)
"""What a key of a project can have; an operator's has more."""
OF_OPERATORS = frozenset(
    {
        "models:write",
        "projects:write",
        "organizations:write",
        "permissions:read",
        "permissions:write",
        "workers:write",
    }
)
KeyId = Annotated[str, typer.Argument(help="The key's id, such as key-3f2b….")]


def seconds(text: str) -> int:
    """90s, 15m, 12h, 30d."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no length of time: write 90s, 15m, 12h or 30d.")
    return int(found[1]) * UNITS[found[2]]


def duration(help_text: str, *names: str) -> Any:
    """An option that takes a length of time."""
    return typer.Option(*names, help=help_text, parser=seconds, metavar="<duration>")


ExpiresIn = Annotated[int | None, duration("How long it is good for: 12h, 90d. Left out: as long as yours.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    *,
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may do, such as jobs:write; may be repeated. None: all of yours.")
    ] = None,
    expires_in: ExpiresIn = None,
    operator: Annotated[bool, typer.Option("--operator", help="May do what reaches beyond a project.")] = False,
    project: Annotated[str | None, typer.Option(help="Another than yours, for operators.")] = None,
    highest_priority: Annotated[
        Priority | None, typer.Option(help="Highest priority of its jobs, for operators. Default: normal.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once, alone on stdout."""
    key = client().keys.create(
        name,
        scopes=scope,
        expires_at=None if expires_in is None else int(time.time()) + expires_in,
        is_operator=operator,
        project=project,
        highest_priority=None if highest_priority is None else highest_priority.value,
    )
    _show_once(key, as_json=as_json)


@app.command("list")
def list_(
    every: Annotated[bool, typer.Option("--all", help="Those that were revoked or have expired, too.")] = False,
    project: Annotated[str | None, typer.Option(help="Another than yours, for operators.")] = None,
    as_json: AsJson = False,
) -> None:
    """The project's keys, without what it takes to use them."""
    keys = [key for key in client().keys.list(project=project) if every or key.status == "active"]
    if as_json:
        return output.print_json([key.raw for key in keys])
    columns = (
        Column(title="ID"),
        Column(title="NAME", narrowest=8),
        Column(title="ENDS", goes=4),
        Column(title="STATUS", goes=1),
        Column(title="MAY", goes=2, narrowest=16),
        Column(title="CREATED", goes=5),
        Column(title="EXPIRES"),
        Column(title="LAST USE", goes=3),
    )
    return table(columns, map(_row, keys), empty="There is no key here. `lorry keys list --all` shows those of before.")


@app.command()
def revoke(
    key_id: KeyId,
    *,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Cancel the jobs and sweeps that it created and that have not finished.")
    ] = False,
    with_descendants: Annotated[
        bool, typer.Option("--with-descendants", help="Also revoke the keys that it created, and theirs, and so on.")
    ] = False,
    _yes: YesTaken = False,
    as_json: AsJson = False,
) -> None:
    """Revoke a key now, and the browser sessions made from it."""
    key = client().keys.revoke(key_id, cancel=cancel, with_descendants=with_descendants)
    if as_json:
        return output.print_json(key.raw)
    others = len(key.revoked_keys) - 1
    descendants = "1 key that descends" if others == 1 else f"{others} keys that descend"
    also = f", and {descendants} from it," if others > 0 else ""
    output.say(f"{key.id} ({key.name}){also} {'are' if also else 'is'} not valid any more.")
    if cancel:
        output.say("Its unfinished jobs and sweeps are being cancelled.")
    elif key.unfinished_jobs or key.unfinished_sweeps:
        left = f"{key.unfinished_jobs} jobs and {key.unfinished_sweeps} sweeps"
        output.say(f"Unfinished work that it created: {left}. Cancel them: lorry keys revoke {key.id} --cancel")
    if key.valid_descendants:
        command = f"lorry keys revoke {key.id} --with-descendants"
        output.say(f"Valid keys that descend from it: {key.valid_descendants}. Revoke them: {command}")
    return None


@app.command()
def rotate(
    key_id: KeyId,
    *,
    overlap: Annotated[int | None, duration("How long the old key is still good: 0s, 12h. Left out: 1d.")] = None,
    expires_in: ExpiresIn = None,
    as_json: AsJson = False,
) -> None:
    """Make a key that takes the place of another. For a while both are good."""
    lorry = client()
    expires_at = None if expires_in is None else int(time.time()) + expires_in
    key = lorry.keys.rotate(key_id, overlap_seconds=overlap, expires_at=expires_at)
    _show_once(key, as_json=as_json)
    _note_own(lorry, key_id, key)
    if not as_json:
        still = "a day" if overlap is None else f"{overlap} s"
        output.say(f"The old key, {key_id}, is good for {still} more at most.")


@app.command()
def limit(
    key_id: KeyId,
    *,
    requests_per_minute: Annotated[
        str | None, typer.Option(help="A number; 0: any number; service: as the service says.")
    ] = None,
    jobs_per_day: Annotated[str | None, typer.Option(help="The same, of jobs that it creates.")] = None,
    highest_priority: Annotated[Priority | None, typer.Option(help="Highest priority of its jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set the limits of a key (an operator's key only). What is left out stays as it is."""
    key = client().keys.limit(
        key_id,
        requests_per_minute=_number(requests_per_minute),
        jobs_per_day=_number(jobs_per_day),
        highest_priority=None if highest_priority is None else highest_priority.value,
    )
    if as_json:
        return output.print_json(key.raw)
    told = [_limit_text(key.requests_per_minute, "requests a minute"), _limit_text(key.jobs_per_day, "jobs a day")]
    told += [f"priority at most {key.highest_priority}"] if key.highest_priority else []
    return output.say(f"{key.id} ({key.name}): {', '.join(told)}.")


def _show_once(key: ApiKey, *, as_json: bool) -> None:
    if as_json:
        return output.print_json(key.raw)
    output.console().print(key.value, soft_wrap=True)
    until = f" It is good until {output.when(key.expires_at)}." if key.expires_at else ""
    return output.say(f"This is {key.id} ({key.name}). It is not shown again: keep it now.{until}")


def _note_own(lorry: Lorry, old_id: str, key: ApiKey) -> None:
    """The key that this command itself came with: a local service's file gets the new one."""
    from dataclasses import replace

    from lorry import connection

    if (lorry.api_key or "").split("_")[1:2] != [old_id]:
        return
    folder = connection.default_data_dir()
    local = connection.read(folder)
    if local is not None and local.api_key == lorry.api_key:
        path = connection.write(folder, replace(local, api_key=key.value))
        output.say(f"The new key is in {path}.")
    else:
        output.say("That was the key that you use: put the new one into LORRY_API_KEY.")


def _row(key: ApiKey) -> tuple[object, ...]:
    every = SCOPES | OF_OPERATORS if key.is_operator else SCOPES
    scopes = "all" if every.issubset(key.scopes) else " ".join(key.scopes)
    may = f"operator: {scopes}" if key.is_operator else scopes
    ends = f"…{key.redacted_value.rpartition('…')[2]}"
    last = output.briefly(key.last_used_at) or "never"
    expires = output.briefly(key.expires_at) or "never"
    return key.id, key.name, ends, key.status, may, output.briefly(key.created_at), expires, last


def _number(text: str | None) -> int | Literal["service"] | None:
    if text is None:
        return None
    if text == "service":
        return "service"
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number nor the word service.")
    return int(text)


def _limit_text(limit: int | None, what: str) -> str:
    return f"{what} as the service says" if limit is None else f"{limit} {what}" if limit else f"any {what}"
