"""`lorry keys`: create, limit, rotate and revoke API keys."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.parsing.durations import duration
from lorry.cli.parsing.option_values import Priority
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.client import Lorry
    from lorry.models import ApiKey, RevokedKey

app = group("Manage API keys.")
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
        "models:answer",
    }
)
"""The scopes of a project key, as in catalog.tenancy.scopes. An operator key may also have OPERATOR_SCOPES."""
OPERATOR_SCOPES = frozenset(
    {
        "models:write",
        "projects:write",
        "organizations:write",
        "permissions:read",
        "permissions:write",
        "workers:write",
    }
)
KeyId = Annotated[
    str, typer.Argument(metavar="KEY", help="ID of the key, such as key-3f2b…, or a unique prefix of it.")
]
ExpiresIn = Annotated[
    int | None, duration("Time until the key expires, such as 12h or 90d (default: when your own key expires).")
]
ProjectOption = Annotated[
    str | None, typer.Option(help="Project of the key, by name or ID (default: your own; operator key required).")
]


@app.verb(
    "create",
    "lorry keys create ci --scope jobs:read --scope jobs:write --expires-in 90d",
    "lorry keys create ops --operator",
    "lorry keys create search-team --project search > key.txt",
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name that describes the use of the key.")],
    *,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Scope to grant, such as jobs:write (repeatable; default: all scopes of your key)."),
    ] = None,
    expires_in: ExpiresIn = None,
    operator: Annotated[bool, typer.Option("--operator", help="Create an operator (admin) key.")] = False,
    project: ProjectOption = None,
    highest_priority: Annotated[
        Priority | None,
        typer.Option(help="Highest priority of the key's jobs (default: normal; operator key required)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create an API key. Stdout has only the secret, which is not shown again."""
    lorry = client()
    key = lorry.keys.create(
        name,
        scopes=scope,
        expires_at=None if expires_in is None else int(time.time()) + expires_in,
        is_operator=operator,
        project=project and lookup.project(lorry, project),
        highest_priority=None if highest_priority is None else highest_priority.value,
    )
    _show_once(key, as_json=as_json)


@app.verb("list", "lorry keys list", "lorry keys list --all --project search", "lorry keys list -q")
def list_(
    every: Annotated[bool, typer.Option("--all", help="Include revoked and expired keys.")] = False,
    project: ProjectOption = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List API keys (secrets are never shown)."""
    lorry = client()
    found = lorry.keys.list(project=project and lookup.project(lorry, project))
    keys = (key for key in found if every or key.status == "active")
    columns = (
        Column("ID", "id"),
        Column("NAME", "name", min_width=8),
        Column("SECRET", lambda key: f"…{key.redacted_value.rpartition('…')[2]}", priority=4),
        Column("STATUS", "status", priority=1),
        Column("SCOPES", _rights, priority=2, min_width=16),
        Column("CREATED", date("created_at"), priority=5),
        Column("EXPIRES", lambda key: output.briefly(key.expires_at) or "never"),
        Column("LAST USED", lambda key: output.briefly(key.last_used_at) or "never", priority=3),
    )
    empty = "No active keys. Use --all to include revoked and expired keys."
    listing(keys, columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry keys show key-3f2b", "lorry keys show key-3f2b --json")
def show(key_id: KeyId, as_json: AsJson = False) -> None:
    """Show an API key's rights and limits (secrets are never shown)."""
    lorry = client()
    key = lorry.keys.get(lookup.key(lorry, key_id))
    output.print_facts(key, _facts(key), as_json=as_json)


@app.verb("revoke", "lorry keys revoke key-3f2b", "lorry keys revoke key-3f2b --cancel --with-descendants --yes")
def revoke(
    key_id: KeyId,
    *,
    cancel: Annotated[
        bool,
        typer.Option(
            "--cancel", help="Also cancel the unfinished jobs, sweeps, batches and exports that the key created."
        ),
    ] = False,
    with_descendants: Annotated[
        bool, typer.Option("--with-descendants", help="Also revoke the keys that it created, and theirs, and so on.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Revoke a key immediately, together with its browser sessions. This can't be undone."""
    lorry = client()
    key_id = lookup.key(lorry, key_id)
    also = " and the keys that descend from it" if with_descendants else ""
    work = " Its unfinished work is cancelled." if cancel else ""
    output.confirm(f"Revoke key {key_id}{also}? This can't be undone.{work}", yes=yes)
    key = lorry.keys.revoke(key_id, cancel=cancel, with_descendants=with_descendants)
    if as_json:
        return output.print_json(key.raw)
    others = len(key.revoked_keys) - 1
    descendants = "1 key that descends" if others == 1 else f"{others} keys that descend"
    output.echo(f"Revoked {key.id} ({key.name}){f' and {descendants} from it' if others > 0 else ''}.")
    if cancel:
        output.echo("Its unfinished work is being cancelled.")
    elif left := _unfinished(key):
        output.echo(f"Unfinished work that it created: {left}. Cancel them: lorry keys revoke {key.id} --cancel")
    if key.valid_descendants:
        command = f"lorry keys revoke {key.id} --with-descendants"
        output.echo(f"Valid keys that descend from it: {key.valid_descendants}. Revoke them: {command}")
    return None


def _unfinished(key: RevokedKey) -> str:
    """Return the unfinished work that the revoked keys created, or an empty string."""
    counts = {
        "jobs": key.unfinished_jobs,
        "sweeps": key.unfinished_sweeps,
        "batches": key.unfinished_batches,
        "exports": key.unfinished_exports,
    }
    return ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)


@app.verb("rotate", "lorry keys rotate key-3f2b", "lorry keys rotate key-3f2b --overlap 0s --expires-in 90d > key.txt")
def rotate(
    key_id: KeyId,
    *,
    overlap: Annotated[
        int | None, duration("Time for which the old key remains valid, such as 0s or 12h (default: 1d).")
    ] = None,
    expires_in: ExpiresIn = None,
    as_json: AsJson = False,
) -> None:
    """Replace a key with a new one with the same rights. Both are valid during the overlap."""
    lorry = client()
    key_id = lookup.key(lorry, key_id)
    expires_at = None if expires_in is None else int(time.time()) + expires_in
    key = lorry.keys.rotate(key_id, overlap_seconds=overlap, expires_at=expires_at)
    _show_once(key, as_json=as_json)
    _store_own(lorry, key_id, key)
    if not as_json:
        overlap_text = output.duration_in_words(86_400 if overlap is None else overlap)
        output.echo(f"The old key {key_id} remains valid for at most {overlap_text}.")


@app.verb(
    "update",
    "lorry keys update key-3f2b --requests-per-minute 600 --jobs-per-day 50",
    "lorry keys update key-3f2b --requests-per-minute service",
    "lorry keys update key-3f2b --highest-priority urgent",
)
def update(
    key_id: KeyId,
    *,
    requests_per_minute: Annotated[
        str | None,
        typer.Option(help="Maximum requests per minute; 0: unlimited; service: the service's default.", metavar="N"),
    ] = None,
    jobs_per_day: Annotated[
        str | None,
        typer.Option(help="Maximum jobs created per day; 0: unlimited; service: the service's default.", metavar="N"),
    ] = None,
    highest_priority: Annotated[Priority | None, typer.Option(help="Highest priority of the key's jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set a key's limits (operator key required). Omitted limits stay unchanged."""
    lorry = client()
    key = lorry.keys.limit(
        lookup.key(lorry, key_id),
        requests_per_minute=_number(requests_per_minute),
        jobs_per_day=_number(jobs_per_day),
        highest_priority=None if highest_priority is None else highest_priority.value,
    )
    if as_json:
        return output.print_json(key.raw)
    limits = [_limit_text(key.requests_per_minute, "requests/minute"), _limit_text(key.jobs_per_day, "jobs/day")]
    limits += [f"highest priority {key.highest_priority}"] if key.highest_priority else []
    return output.echo(f"Updated {key.id} ({key.name}): {', '.join(limits)}.")


def _show_once(key: ApiKey, *, as_json: bool) -> None:
    if as_json:
        return output.print_json(key.raw)
    output.console().print(key.value, soft_wrap=True)
    until = f" It expires at {output.when(key.expires_at)}." if key.expires_at else ""
    return output.echo(f"Created {key.id} ({key.name}). Its secret is on stdout and is not shown again.{until}")


def _store_own(lorry: Lorry, old_id: str, key: ApiKey) -> None:
    """Store the new key in the file that the rotated key came from, if this command uses that key."""
    from dataclasses import replace

    from lorry import connection

    if (lorry.api_key or "").split("_")[1:2] != [old_id]:
        return
    for folder in (connection.login_dir(), connection.default_data_dir()):
        known = connection.read(folder)
        if known is not None and known.api_key == lorry.api_key:
            path = connection.write(folder, replace(known, api_key=key.value))
            return output.echo(f"Stored the new key in {path}.")
    return output.echo("You rotated the key that you use. Set LORRY_API_KEY to the new one.")


def _facts(key: ApiKey) -> Iterator[tuple[str, object]]:
    yield "id", key.id
    yield "name", key.name
    yield "secret", key.redacted_value
    yield "status", key.status
    yield "project", key.project_id
    yield "operator", key.is_operator
    yield "scopes", " ".join(key.scopes)
    yield "requests/minute", _limit_text(key.requests_per_minute, "").strip(" :")
    yield "jobs/day", _limit_text(key.jobs_per_day, "").strip(" :")
    yield "highest priority", key.highest_priority
    yield "created", output.when(key.created_at or None)
    yield "created by", key.created_by
    yield "last used", output.when(key.last_used_at)
    yield "expires", output.when(key.expires_at)
    yield "revoked", output.when(key.revoked_at)
    yield "replaced by", key.replaced_by


def _rights(key: ApiKey) -> str:
    every = SCOPES | OPERATOR_SCOPES if key.is_operator else SCOPES
    scopes = "all" if every.issubset(key.scopes) else " ".join(key.scopes)
    return f"operator: {scopes}" if key.is_operator else scopes


def _number(text: str | None) -> int | Literal["service"] | None:
    if text is None:
        return None
    if text == "service":
        return "service"
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number nor 'service'.")
    return int(text)


def _limit_text(limit: int | None, what: str) -> str:
    return f"{what}: service default" if limit is None else f"{limit} {what}" if limit else f"{what}: unlimited"
