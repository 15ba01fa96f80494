"""`lorry webhooks`: endpoints that receive events, and the log of deliveries."""

from __future__ import annotations

import time
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.parsing.durations import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes, YesAccepted
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorry.models import WebhookDelivery, WebhookEndpoint

app = group("Manage webhook endpoints.")
EndpointId = Annotated[
    str, typer.Argument(metavar="WEBHOOK", help="ID of the endpoint, such as webhook-3f2b…, or a unique prefix of it.")
]
Events = Annotated[
    list[str] | None,
    typer.Option(
        help="Event type to send, such as fine_tuning.job.failed (repeatable; default: the three final states of jobs)."
    ),
]


class DeliveryStatus(StrEnum):
    """The states of a delivery."""

    pending = "pending"
    delivered = "delivered"
    failed = "failed"


@app.verb(
    "create",
    "lorry webhooks create https://example.com/hooks",
    "lorry webhooks create https://example.com/hooks --events fine_tuning.job.failed --name ops > secret.txt",
)
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="HTTPS address that events are posted to.")],
    *,
    events: Events = None,
    name: Annotated[str | None, typer.Option(help="Name of the endpoint (default: the host of the URL).")] = None,
    as_json: AsJson = False,
) -> None:
    """Create an endpoint. Stdout has only its signing secret, which is not shown again."""
    given = {} if events is None else {"event_types": events}
    endpoint = client().webhooks.create(url, name=name or urlsplit(url).hostname or "webhook", **given)
    _show_once(endpoint, as_json=as_json)
    if not as_json:
        output.echo(f"Test it with: lorry webhooks test {endpoint.id}")


@app.verb("list", "lorry webhooks list", "lorry webhooks list --json")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the project's endpoints."""
    columns = (
        Column("ID", "id"),
        Column("NAME", "name", min_width=8),
        Column("STATUS", _status),
        Column("URL", "url", min_width=16),
        Column("EVENTS", lambda one: " ".join(one.event_types), priority=2, min_width=16),
        Column("CREATED", date("created_at"), priority=1),
    )
    empty = "No webhooks yet. Create one with `lorry webhooks create URL`."
    listing(client().webhooks.list(), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry webhooks show webhook-3f2b", "lorry webhooks show webhook-3f2b --json")
def show(endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Show an endpoint's details (secrets are never shown)."""
    lorry = client()
    endpoint = lorry.webhooks.get(lookup.webhook(lorry, endpoint_id))
    output.print_facts(endpoint, _facts(endpoint), as_json=as_json)


@app.verb(
    "test",
    "lorry webhooks test webhook-3f2b",
    "lorry webhooks test webhook-3f2b --event fine_tuning.job.failed",
)
def try_(
    endpoint_id: EndpointId,
    *,
    event: Annotated[str, typer.Option(help="Event type of the sample.")] = "fine_tuning.job.succeeded",
    as_json: AsJson = False,
) -> None:
    """Send a sample event and show the response. Exits with 1 unless the status is 2xx."""
    lorry = client()
    endpoint_id = lookup.webhook(lorry, endpoint_id)
    answer = lorry.webhooks.test(endpoint_id, event_type=event)
    sentence = f"{endpoint_id} responded with {answer.status_code}{_quoted(answer.reply)}."
    output.print_result(answer, sentence, as_json=as_json)
    if not 200 <= answer.status_code < 300:
        raise typer.Exit(1)


@app.verb(
    "deliveries",
    "lorry webhooks deliveries webhook-3f2b",
    "lorry webhooks deliveries webhook-3f2b --status failed --limit 100",
)
def deliveries(
    endpoint_id: EndpointId,
    *,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Show only deliveries with this status.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of deliveries to list.")] = 20,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the deliveries to an endpoint with the responses, newest first."""
    lorry = client()
    sent = lorry.webhooks.deliveries(lookup.webhook(lorry, endpoint_id), status=status and status.value)
    columns = (
        Column("ID", "id"),
        Column("STATUS", "status"),
        Column("EVENT", lambda one: f"{one.event_type}{' (test)' if one.is_test else ''}", min_width=10),
        Column("ABOUT", lambda one: one.data.get("id"), priority=1),
        Column("ATTEMPTS", lambda one: len(one.tries)),
        Column("LAST RESPONSE", _last_response, min_width=8),
        Column("NEXT ATTEMPT", date("next_try_at"), priority=2),
        Column("CREATED", date("created_at"), priority=3),
    )
    empty = "No deliveries to this endpoint yet."
    listing(islice(sent, limit), columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb(
    "replay",
    "lorry webhooks replay delivery-3f2b0c9d8e7f6a5b4c3d2e1f",
    "lorry webhooks replay webhook-3f2b --failed-since 12h",
)
def replay(
    ident: Annotated[
        str,
        typer.Argument(metavar="DELIVERY|WEBHOOK", help="ID of a delivery; with --failed-since, ID of an endpoint."),
    ],
    *,
    failed_since: Annotated[
        int | None,
        duration("Replay all deliveries of the endpoint that failed within this period, such as 30m, 12h or 3d."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a delivery again, or all recently failed deliveries of an endpoint. The event IDs stay the same."""
    lorry = client()
    if failed_since is None:
        delivery = lorry.webhooks.replay(ident)
        return output.print_result(delivery, f"Replaying {delivery.id}.", as_json=as_json)
    ident = lookup.webhook(lorry, ident)
    number = lorry.webhooks.replay_failed(ident, since=int(time.time()) - failed_since)
    if as_json:
        return output.print_json({"webhook_endpoint_id": ident, "replayed": number})
    return output.echo(f"Replaying {number} deliver{'y' if number == 1 else 'ies'}.")


@app.verb(
    "rotate-secret",
    "lorry webhooks rotate-secret webhook-3f2b > secret.txt",
    "lorry webhooks rotate-secret webhook-3f2b --overlap 12h",
)
def rotate_secret(
    endpoint_id: EndpointId,
    *,
    overlap: Annotated[
        int, duration("Time for which events are also signed with the old secret, such as 0s or 12h.")
    ] = "1d",  # pyright: ignore[reportArgumentType] - the parser reads it
    as_json: AsJson = False,
) -> None:
    """Replace an endpoint's signing secret. Stdout has only the new one, which is not shown again."""
    lorry = client()
    endpoint = lorry.webhooks.rotate_secret(lookup.webhook(lorry, endpoint_id), overlap_seconds=overlap)
    _show_once(endpoint, as_json=as_json)
    if not as_json and endpoint.old_secret_until:
        output.echo(f"Events are also signed with the old secret until {output.when(endpoint.old_secret_until)}.")


@app.verb(
    "update",
    "lorry webhooks update webhook-3f2b --url https://example.com/new",
    "lorry webhooks update webhook-3f2b --events fine_tuning.job.failed --events fine_tuning.job.succeeded",
)
def update(
    endpoint_id: EndpointId,
    *,
    url: Annotated[str | None, typer.Option(help="New HTTPS address.")] = None,
    name: Annotated[str | None, typer.Option(help="New name.")] = None,
    events: Annotated[
        list[str] | None, typer.Option(help="Event types to send instead of the current ones (repeatable).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Update an endpoint. Omitted settings stay unchanged."""
    lorry = client()
    endpoint_id = lookup.webhook(lorry, endpoint_id)
    endpoint = lorry.webhooks.change(endpoint_id, url=url, name=name, event_types=events)
    message = f"Updated {endpoint.id} ({endpoint.name}). It receives {', '.join(endpoint.event_types)}."
    output.print_result(endpoint, message, as_json=as_json)


@app.verb("enable", "lorry webhooks enable webhook-3f2b", "lorry webhooks enable webhook-3f2b --json")
def enable(endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Enable a disabled endpoint."""
    lorry = client()
    endpoint = lorry.webhooks.change(lookup.webhook(lorry, endpoint_id), enabled=True)
    missed = f"lorry webhooks replay {endpoint.id} --failed-since 1d"
    sentence = f"Enabled {endpoint.id} ({endpoint.name}). Replay missed events with: {missed}"
    output.print_result(endpoint, sentence, as_json=as_json)


@app.verb("disable", "lorry webhooks disable webhook-3f2b", "lorry webhooks disable webhook-3f2b --json")
def disable(endpoint_id: EndpointId, _yes: YesAccepted = False, as_json: AsJson = False) -> None:
    """Disable an endpoint. Events are kept and can be replayed later."""
    lorry = client()
    endpoint = lorry.webhooks.change(lookup.webhook(lorry, endpoint_id), enabled=False)
    enabling = f"lorry webhooks enable {endpoint.id}"
    sentence = f"Disabled {endpoint.id} ({endpoint.name}). Enable it with: {enabling}"
    output.print_result(endpoint, sentence, as_json=as_json)


@app.verb("delete", "lorry webhooks delete webhook-3f2b", "lorry webhooks delete webhook-3f2b --yes")
def delete(endpoint_id: EndpointId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete an endpoint and its log of deliveries. This can't be undone."""
    lorry = client()
    endpoint_id = lookup.webhook(lorry, endpoint_id)
    output.confirm(f"Delete webhook {endpoint_id} and its log of deliveries? This can't be undone.", yes=yes)
    lorry.webhooks.delete(endpoint_id)
    output.print_deleted("webhook", endpoint_id, as_json=as_json)


def _show_once(endpoint: WebhookEndpoint, *, as_json: bool) -> None:
    if as_json:
        return output.print_json(endpoint.raw)
    output.console().print(endpoint.signing_secret, soft_wrap=True)
    return output.echo(
        f"This is the signing secret of {endpoint.id} ({endpoint.name}). It is not shown again: store it now."
    )


def _facts(endpoint: WebhookEndpoint) -> Iterator[tuple[str, object]]:
    yield "id", endpoint.id
    yield "name", endpoint.name
    yield "status", _status(endpoint)
    yield "url", endpoint.url
    yield "events", "\n".join(endpoint.event_types)
    yield "secret", endpoint.signing_secret_hint
    yield "old secret until", output.when(endpoint.old_secret_until)
    yield "created", output.when(endpoint.created_at or None)
    yield "failing since", output.when(endpoint.failing_since)
    yield "disabled", output.when(endpoint.disabled_at)


def _status(endpoint: WebhookEndpoint) -> str:
    reason = f" ({endpoint.disabled_reason})" if endpoint.disabled_reason else ""
    failing = " (failing)" if endpoint.failing_since and not endpoint.disabled_at else ""
    return f"{endpoint.status}{reason}{failing}"


def _last_response(delivery: WebhookDelivery) -> object:
    last: dict[str, Any] = delivery.tries[-1] if delivery.tries else {}
    return last.get("status_code") or last.get("error")


def _quoted(reply: str) -> str:
    return f": {output.brief(reply)}" if reply.strip() else ""
