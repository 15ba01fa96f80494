"""`lorry usage`: what was used, by day."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorry.cli.app import client
from lorry.cli.commands.keys import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.models.accounts import UsageBucket, UsageResult

GROUPS: dict[str, tuple[Literal["organization_id", "project_id", "model"], ...]] = {
    "project": ("project_id",),
    "model": ("model",),
    "both": ("project_id", "model"),
    "organization": ("organization_id",),
}


def usage(
    *,
    since: Annotated[int, duration("How far back: 7d, 30d.")] = "7d",  # pyright: ignore
    by: Annotated[str, typer.Option(help="project, model, or both; or organization.")] = "project",
    project: Annotated[list[str] | None, typer.Option(help="Name or id; may be repeated.")] = None,
    organization: Annotated[list[str] | None, typer.Option(help="Name or id; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A base model; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was used on each day (UTC): by your project; for operators, by all."""
    if by not in GROUPS:
        raise typer.BadParameter(f"{by!r} is none of project, model, both and organization.")
    lorry = client()
    begin = int(time.time()) - since
    days = lorry.usage.list(
        start_time=begin,
        group_by=GROUPS[by],
        project_ids=project or (),
        organization_ids=organization or (),
        models=model or (),
    )
    found = list(days)
    if as_json:
        return output.print_json([bucket.raw for bucket in found])
    is_by_organization = by == "organization"
    owners = lorry.organizations.list() if is_by_organization else lorry.projects.list(archived=True)
    names = {one.id: one.name for one in owners}
    columns = (
        Column(title="DAY"),
        Column(title="ORGANIZATION" if is_by_organization else "PROJECT", narrowest=8),
        Column(title="MODEL", narrowest=8),
        Column(title="DEVICE-HOURS"),
        Column(title="TOKENS", goes=2),
        Column(title="CREATED", goes=3),
        Column(title="SUCCEEDED"),
        Column(title="FAILED", goes=1),
        Column(title="CANCELLED", goes=4),
        Column(title="STORED"),
    )
    rows = [_row(bucket, result, names) for bucket in found for result in bucket.results]
    return table(columns, rows, empty="Nothing was used in that time.")


def _row(bucket: UsageBucket, result: UsageResult, names: dict[str, str]) -> tuple[object, ...]:
    day = f"{datetime.fromtimestamp(bucket.start_time, UTC):%Y-%m-%d}"
    owner = result.organization_id or result.project_id
    jobs = [result.num_jobs.get(name, 0) for name in ("created", "succeeded", "failed", "cancelled")]
    hours = f"{result.device_seconds / 3600:.2f}"
    stored = None if result.stored_bytes is None else output.size(result.stored_bytes)
    return day, names.get(owner or "", owner), result.model, hours, result.trained_tokens, *jobs, stored
