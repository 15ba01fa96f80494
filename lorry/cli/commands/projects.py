"""`lorry projects`: projects with their names, weights and limits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.parsing.option_values import Priority
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes, YesAccepted
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorry.models import Project, ProjectLimit

app = group("Manage projects and their limits.")
ProjectName = Annotated[
    str, typer.Argument(metavar="PROJECT", help="Name of the project, its ID, or a unique prefix of the ID.")
]
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
NAMES = {
    "concurrent_jobs": "concurrent jobs",
    "queued_jobs": "queued jobs",
    "jobs_per_day": "jobs per day",
    "device_hours_per_month": "device-hours per month",
    "stored_bytes": "stored bytes",
    "plans_per_day": "plans per day",
    "tokens_per_day": "inference tokens per day",
}


def _limit(help_text: str, name: str, *, metavar: str = "N") -> Any:
    return typer.Option(f"--limit-{name}", help=f"{help_text}, or none for unlimited.", metavar=metavar)


@app.verb("create", "lorry projects create search", "lorry projects create search --organization research -q")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name: letters, digits, dots, underscores and hyphens.")],
    organization: Annotated[
        str | None, typer.Option(help="Organization of the project, by name or ID (default: your own).")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Create a project (operator key required)."""
    lorry = client()
    owner = organization and lookup.organization(lorry, organization)
    project = lorry.projects.create(name, organization=owner)
    if quiet:
        return output.print_ids([project.id])
    following = f"lorry keys create NAME --project {project.name}"
    sentence = f"Created project {project.name}. Create a key for it: {following}"
    return output.print_result(project, sentence, as_json=as_json)


@app.verb("list", "lorry projects list", "lorry projects list --archived", "lorry projects list --json")
def list_(
    archived: Annotated[bool, typer.Option("--archived", help="Include archived projects.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List your project or, with an operator key, all projects."""
    lorry = client()
    found = list(lorry.projects.list(archived=archived))
    if output.is_printed(found, as_json=as_json, quiet=quiet):
        return None
    has_owners = any(project.organization_id for project in found)  # older services have no organizations
    owners = {one.id: one.name for one in lorry.organizations.list()} if has_owners else {}
    rows = [
        (p.name, p.id, owners.get(p.organization_id), p.status, f"{p.weight:g}", output.briefly(p.created_at))
        for p in found
    ]
    columns = (
        Column(title="NAME"),
        Column(title="ID"),
        Column(title="ORGANIZATION", min_width=8, priority=1),
        Column(title="STATUS"),
        Column(title="WEIGHT"),
        Column(title="CREATED", priority=2),
    )
    return table(columns, rows, empty="No projects.")


@app.verb("show", "lorry projects show search", "lorry projects show search --json")
def show(project: ProjectName, as_json: AsJson = False) -> None:
    """Show a project's details, limits and usage."""
    lorry = client()
    name = lookup.project(lorry, project)
    found, limits = lorry.projects.get(name), lorry.projects.limits(name)
    if as_json:
        return output.print_json({**found.raw, "limits": [limit.raw for limit in limits.values()]})
    output.pairs(_facts(found))
    output.console().print("")
    return _print_limits(limits, highest_priority=found.highest_priority)


@app.verb(
    "update",
    "lorry projects update search --name search-team",
    "lorry projects update search --weight 2 --limit-concurrent-jobs 4",
    "lorry projects update search --limit-stored-bytes 20GB --limit-device-hours none",
)
def update(
    project: ProjectName,
    *,
    name: Annotated[str | None, typer.Option(help="New name. The names of existing adapters don't change.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Fair-share weight, above 0; new projects have 1.", metavar="NUMBER")
    ] = None,
    limit_concurrent_jobs: Annotated[str | None, _limit("Maximum number of running jobs", "concurrent-jobs")] = None,
    limit_queued_jobs: Annotated[str | None, _limit("Maximum number of queued jobs", "queued-jobs")] = None,
    limit_jobs_per_day: Annotated[
        str | None, _limit("Maximum number of jobs created per UTC day", "jobs-per-day")
    ] = None,
    limit_device_hours: Annotated[
        str | None, _limit("Maximum device-hours per calendar month", "device-hours", metavar="HOURS")
    ] = None,
    limit_stored_bytes: Annotated[
        str | None, _limit("Maximum storage, such as 500MB or 20GB", "stored-bytes", metavar="BYTES")
    ] = None,
    limit_plans_per_day: Annotated[
        str | None, _limit("Maximum number of plans created per UTC day", "plans-per-day")
    ] = None,
    limit_tokens_per_day: Annotated[
        str | None, _limit("Maximum number of tokens of inference requests per UTC day", "tokens-per-day")
    ] = None,
    highest_priority: Annotated[Priority | None, typer.Option(help="Highest priority of the project's jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Update a project's name, weight or limits (operator key required). Omitted settings stay unchanged."""
    limits = _limits(
        concurrent_jobs=limit_concurrent_jobs,
        queued_jobs=limit_queued_jobs,
        jobs_per_day=limit_jobs_per_day,
        device_hours=limit_device_hours,
        stored_bytes=limit_stored_bytes,
        plans_per_day=limit_plans_per_day,
        tokens_per_day=limit_tokens_per_day,
        highest_priority=highest_priority,
    )
    if name is None and weight is None and not limits:
        raise typer.BadParameter("pass at least one setting to update.")
    lorry = client()
    given = lookup.project(lorry, project)
    if limits:
        lorry.projects.limit(given, **limits)
    if weight is not None:
        lorry.projects.weigh(given, weight)
    updated = (
        lorry.projects.get(given) if name is None else lorry.projects.rename(given, name)
    )  # last: it has a new name
    sentence = f"Updated project {updated.name}. Show it with: lorry projects show {updated.name}"
    output.print_result(updated, sentence, as_json=as_json)


@app.verb("archive", "lorry projects archive search", "lorry projects archive search --yes")
def archive(project: ProjectName, yes: Yes = False, as_json: AsJson = False) -> None:
    """Archive a project: its keys stop working; its data is kept (operator key required)."""
    lorry = client()
    name = lookup.project(lorry, project)
    output.confirm(f"Archive project {name}? Its keys stop working.", yes=yes)
    archived = lorry.projects.archive(name)
    restoring = f"lorry projects restore {archived.name}"
    output.print_result(archived, f"Archived project {archived.name}. Restore it with: {restoring}", as_json=as_json)


@app.verb("restore", "lorry projects restore search", "lorry projects restore search --json")
def restore(project: ProjectName, _yes: YesAccepted = False, as_json: AsJson = False) -> None:
    """Restore an archived project: its keys work again (operator key required)."""
    lorry = client()
    restored = lorry.projects.restore(lookup.project(lorry, project))
    output.print_result(restored, f"Restored project {restored.name}. Its keys work again.", as_json=as_json)


def _limits(
    *,
    concurrent_jobs: str | None,
    queued_jobs: str | None,
    jobs_per_day: str | None,
    device_hours: str | None,
    stored_bytes: str | None,
    plans_per_day: str | None,
    tokens_per_day: str | None,
    highest_priority: Priority | None,
) -> dict[str, Any]:
    """Return the limits that were passed, as `lorry.projects.limit` takes them."""
    given = {
        "concurrent_jobs": _whole(concurrent_jobs),
        "queued_jobs": _whole(queued_jobs),
        "jobs_per_day": _whole(jobs_per_day),
        "device_hours_per_month": _hours(device_hours),
        "stored_bytes": _bytes(stored_bytes),
        "plans_per_day": _whole(plans_per_day),
        "tokens_per_day": _whole(tokens_per_day),
        "highest_priority": None if highest_priority is None else highest_priority.value,
    }
    return {name: value for name, value in given.items() if value is not None}


def _facts(project: Project) -> Iterator[tuple[str, object]]:
    yield "name", project.name
    yield "id", project.id
    yield "organization", project.organization_id
    yield "status", project.status
    yield "weight", f"{project.weight:g}"
    yield "created", output.when(project.created_at or None)
    yield "created by", project.created_by
    yield "archived", output.when(project.archived_at)


def _print_limits(limits: Mapping[str, ProjectLimit], *, highest_priority: str) -> None:
    rows = [*map(_row, limits.values()), ("priority", highest_priority or "any", None, None)]
    titles = ("LIMIT", "MAXIMUM", "USED", "RESETS")
    table([Column(title=title) for title in titles], rows, empty="No limits.")


def _row(limit: ProjectLimit) -> tuple[object, ...]:
    shown = [
        None if n is None else output.size(n) if limit.name == "stored_bytes" else f"{n:g}"
        for n in (limit.limit, limit.used)
    ]
    return NAMES.get(limit.name, limit.name), shown[0] or "any", shown[1], output.briefly(limit.resets_at)


def _whole(text: str | None) -> int | Literal["none"] | None:
    if text is None or text == "none":
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'none'.")
    return int(text)


def _hours(text: str | None) -> float | Literal["none"] | None:
    if text is None or text == "none":
        return text
    if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        raise typer.BadParameter(f"{text!r} is neither a number of hours nor 'none'.")
    return float(text)


def _bytes(text: str | None) -> int | Literal["none"] | None:
    if text is None or text == "none":
        return text
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?(B|kB|MB|GB|TB)?", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size: use 500MB, 20GB or none.")
    return int(float(found[1]) * UNITS[found[2] or ""])
