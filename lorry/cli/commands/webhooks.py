"""`lorry webhooks`: who is told of what, and what was sent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from lorry.cli.app import client, group
from lorry.cli.commands.keys import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.models.webhooks import WebhookDelivery, WebhookEndpoint

app = group("Webhooks: who is told when a job has ended.")
EndpointId = Annotated[str, typer.Argument(help="The endpoint's id, such as webhook-3f2b….")]
Events = Annotated[
    list[str] | None,
    typer.Option(help="A type of events, such as fine_tuning.job.failed; may be repeated. None: all ends of jobs."),
]


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="Where events are posted: https://….")],
    *,
    events: Events = None,
    name: Annotated[str | None, typer.Option(help="For people. Left out: the URL's host.")] = None,
    as_json: AsJson = False,
) -> None:
    """Have events sent to an address. The secret that verifies them is shown this once, alone on stdout."""
    given = {} if events is None else {"event_types": events}
    endpoint = client().webhooks.create(url, name=name or urlsplit(url).hostname or "webhook", **given)
    _show_once(endpoint, as_json=as_json)
    if not as_json:
        output.say(f"Try it: lorry webhooks test {endpoint.id}")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """The project's endpoints."""
    found = list(client().webhooks.list())
    if as_json:
        return output.print_json([endpoint.raw for endpoint in found])
    columns = (
        Column(title="ID"),
        Column(title="NAME", narrowest=8),
        Column(title="STATUS"),
        Column(title="URL", narrowest=16),
        Column(title="EVENTS", goes=2, narrowest=16),
        Column(title="CREATED", goes=1),
    )
    return table(columns, map(_row, found), empty="There is no webhook. Add one: lorry webhooks add URL")


@app.command("test")
def try_(
    endpoint_id: EndpointId,
    *,
    event: Annotated[str, typer.Option(help="The type of the sample.")] = "fine_tuning.job.succeeded",
    as_json: AsJson = False,
) -> None:
    """Send a sample now, and tell how it was answered. Exits with 1 where that was no success."""
    told = client().webhooks.test(endpoint_id, event_type=event)
    if as_json:
        output.print_json(told.raw)
    else:
        output.say(f"{endpoint_id} answered {told.status_code}{_quoted(told.reply)}.")
    if not 200 <= told.status_code < 300:
        raise typer.Exit(1)


@app.command()
def deliveries(
    endpoint_id: EndpointId,
    *,
    status: Annotated[str | None, typer.Option(help="pending, delivered or failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """What was sent to an endpoint, the newest first, and how it was answered."""
    found = [
        one for one, _ in zip(client().webhooks.deliveries(endpoint_id, status=status), range(limit), strict=False)
    ]
    if as_json:
        return output.print_json([delivery.raw for delivery in found])
    columns = (
        Column(title="ID"),
        Column(title="STATUS"),
        Column(title="EVENT", narrowest=10),
        Column(title="ABOUT", goes=1),
        Column(title="TRIES"),
        Column(title="LAST ANSWER", narrowest=8),
        Column(title="NEXT TRY", goes=2),
        Column(title="CREATED", goes=3),
    )
    return table(columns, map(_delivery_row, found), empty="Nothing was sent there yet.")


@app.command()
def replay(
    ident: Annotated[str, typer.Argument(help="A delivery's id; with --failed-since an endpoint's.")],
    *,
    failed_since: Annotated[int | None, duration("All of an endpoint that failed in the last 30m, 12h, 3d.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send a delivery again, or all of an endpoint that have failed for some time. Their ids stay the same."""
    webhooks = client().webhooks
    if failed_since is None:
        delivery = webhooks.replay(ident)
        return output.print_json(delivery.raw) if as_json else output.say(f"{delivery.id} is sent again.")
    number = webhooks.replay_failed(ident, since=int(time.time()) - failed_since)
    if as_json:
        return output.print_json({"webhook_endpoint_id": ident, "replayed": number})
    return output.say(f"{number} deliver{'y is' if number == 1 else 'ies are'} sent again.")


@app.command()
def rotate(
    endpoint_id: EndpointId,
    *,
    overlap: Annotated[int, duration("How long messages are signed with the old secret too: 0s, 12h.")] = "1d",  # pyright: ignore[reportArgumentType] - the parser reads it
    as_json: AsJson = False,
) -> None:
    """Make a new secret. It is shown this once, alone on stdout."""
    endpoint = client().webhooks.rotate_secret(endpoint_id, overlap_seconds=overlap)
    _show_once(endpoint, as_json=as_json)
    if not as_json and endpoint.old_secret_until:
        output.say(f"Messages are signed with the old secret too until {output.when(endpoint.old_secret_until)}.")


@app.command()
def change(
    endpoint_id: EndpointId,
    *,
    url: Annotated[str | None, typer.Option(help="Another address.")] = None,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    events: Annotated[list[str] | None, typer.Option(help="All types that are sent from now on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change an endpoint. What is left out stays as it is."""
    endpoint = client().webhooks.change(endpoint_id, url=url, name=name, event_types=events)
    _print_result(endpoint, f"{endpoint.id} ({endpoint.name}) is sent {', '.join(endpoint.event_types)}.", as_json)


@app.command()
def enable(endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Send events again to an endpoint that is disabled."""
    endpoint = client().webhooks.change(endpoint_id, enabled=True)
    missed = f"lorry webhooks replay {endpoint.id} --failed-since 1d"
    _print_result(endpoint, f"{endpoint.id} ({endpoint.name}) is enabled. Send what it has missed: {missed}", as_json)


@app.command()
def disable(endpoint_id: EndpointId, _yes: YesTaken = False, as_json: AsJson = False) -> None:
    """Send nothing to an endpoint until it is enabled. Events are kept, to be replayed."""
    endpoint = client().webhooks.change(endpoint_id, enabled=False)
    _print_result(
        endpoint, f"{endpoint.id} ({endpoint.name}) is sent nothing until: lorry webhooks enable {endpoint.id}", as_json
    )


@app.command()
def remove(
    endpoint_id: EndpointId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Delete an endpoint, and with it the log of what was sent there."""
    output.confirm(f"Remove {endpoint_id}, and the log of what was sent there?", yes=yes)
    client().webhooks.delete(endpoint_id)
    output.say(f"{endpoint_id} is removed.")


def _show_once(endpoint: WebhookEndpoint, *, as_json: bool) -> None:
    if as_json:
        return output.print_json(endpoint.raw)
    output.console().print(endpoint.signing_secret, soft_wrap=True)
    return output.say(f"This is the secret of {endpoint.id} ({endpoint.name}). It is not shown again: keep it now.")


def _print_result(endpoint: WebhookEndpoint, sentence: str, as_json: bool) -> None:
    if as_json:
        output.print_json(endpoint.raw)
    else:
        output.say(sentence)


def _row(endpoint: WebhookEndpoint) -> tuple[object, ...]:
    why = f" ({endpoint.disabled_reason})" if endpoint.disabled_reason else ""
    failing = " (failing)" if endpoint.failing_since and not endpoint.disabled_at else ""
    status = f"{endpoint.status}{why}{failing}"
    events = " ".join(endpoint.event_types)
    return endpoint.id, endpoint.name, status, endpoint.url, events, output.briefly(endpoint.created_at)


def _delivery_row(delivery: WebhookDelivery) -> tuple[object, ...]:
    last: dict[str, Any] = delivery.tries[-1] if delivery.tries else {}
    answer = last.get("status_code") or last.get("error") or "-"
    event = f"{delivery.event_type}{' (test)' if delivery.is_test else ''}"
    times = output.briefly(delivery.next_try_at) or "-", output.briefly(delivery.created_at)
    return delivery.id, delivery.status, event, delivery.data.get("id"), len(delivery.tries), answer, *times


def _quoted(reply: str) -> str:
    return f": {output.brief(reply)}" if reply.strip() else ""
