"""`lorry usage`: usage by day."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorry.cli import lookup
from lorry.cli.app import client
from lorry.cli.parsing.durations import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.models import UsageBucket, UsageResult


class Grouping(StrEnum):
    """The groupings of usage."""

    project = "project"
    model = "model"
    both = "both"
    organization = "organization"


GROUPS: dict[Grouping, tuple[Literal["organization_id", "project_id", "model"], ...]] = {
    Grouping.project: ("project_id",),
    Grouping.model: ("model",),
    Grouping.both: ("project_id", "model"),
    Grouping.organization: ("organization_id",),
}


COUNTS = ("created", "succeeded", "failed", "cancelled", "requests", "prompt_tokens", "completion_tokens")
EXAMPLES = ("lorry usage", "lorry usage --since 30d --by model", "lorry usage --by organization --json")


def usage(
    *,
    since: Annotated[int, duration("Period to show, such as 7d or 30d.")] = "7d",  # pyright: ignore
    by: Annotated[Grouping, typer.Option(help="Grouping of the usage of a day.")] = Grouping.project,
    project: Annotated[
        list[str] | None, typer.Option(help="Show only this project, by name or ID (repeatable).")
    ] = None,
    organization: Annotated[
        list[str] | None, typer.Option(help="Show only this organization, by name or ID (repeatable).")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Show only this base model (repeatable).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show usage per UTC day: of your project or, with an operator key, of all projects."""
    lorry = client()
    begin = int(time.time()) - since
    days = lorry.usage.list(
        start_time=begin,
        group_by=GROUPS[by],
        project_ids=[lookup.project(lorry, typed) for typed in project or ()],
        organization_ids=[lookup.organization(lorry, typed) for typed in organization or ()],
        models=model or (),
    )
    found = list(days)
    if as_json:
        return output.print_json([bucket.raw for bucket in found])
    is_by_organization = by is Grouping.organization
    owners = lorry.organizations.list() if is_by_organization else lorry.projects.list(archived=True)
    names = {one.id: one.name for one in owners}
    columns = (
        Column("DAY", "day"),
        Column("ORGANIZATION" if is_by_organization else "PROJECT", "owner", min_width=8),
        Column("MODEL", "model", min_width=8),
        Column("DEVICE-HOURS", "device_hours"),
        Column("TRAINED TOKENS", "trained_tokens", priority=2),
        Column("CREATED", "created", priority=3),
        Column("SUCCEEDED", "succeeded"),
        Column("FAILED", "failed", priority=1),
        Column("CANCELLED", "cancelled", priority=4),
        Column("REQUESTS", "requests", priority=5),
        Column("PROMPT TOKENS", "prompt_tokens", priority=7),
        Column("ANSWER TOKENS", "completion_tokens", priority=6),
        Column("STORED", "stored"),
    )
    rows = [_row(bucket, result, names) for bucket in found for result in bucket.results]
    return table(columns, rows, empty="No usage in this time.")


def _row(bucket: UsageBucket, result: UsageResult, names: dict[str, str]) -> dict[str, object]:
    owner = result.organization_id or result.project_id
    return {
        "day": f"{datetime.fromtimestamp(bucket.start_time, UTC):%Y-%m-%d}",
        "owner": names.get(owner or "", owner),
        "model": result.model,
        "device_hours": f"{result.device_seconds / 3600:.2f}",
        "trained_tokens": result.trained_tokens,
        **dict.fromkeys(COUNTS, 0),
        **result.num_jobs,
        **result.completions,
        "stored": None if result.stored_bytes is None else output.size(result.stored_bytes),
    }
