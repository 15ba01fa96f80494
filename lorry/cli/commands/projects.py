"""`lorry projects`: projects with their names, weights and limits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group, parameters_of, set_parameters
from lorry.cli.parsing.option_values import Priority
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes, YesAccepted
from lorry.cli.render.tables import Column, date, listing, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorry.models import Project, ProjectLimit

app = group("Manage projects and their limits.")
ProjectName = Annotated[
    str, typer.Argument(metavar="PROJECT", help="Name of the project, its ID, or a unique prefix of the ID.")
]
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _whole(text: str) -> int | Literal["none"]:
    if text == "none":
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'none'.")
    return int(text)


def _hours(text: str) -> float | Literal["none"]:
    if text == "none":
        return text
    if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        raise typer.BadParameter(f"{text!r} is neither a number of hours nor 'none'.")
    return float(text)


def _bytes(text: str) -> int | Literal["none"]:
    if text == "none":
        return text
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?(B|kB|MB|GB|TB)?", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a size: use 500MB, 20GB or none.")
    return int(float(found[1]) * UNITS[found[2] or ""])


@dataclass(frozen=True, slots=True)
class Quota:
    """A quota of a project, by the name of its field."""

    title: str
    option: str
    help: str
    metavar: str = "N"
    parser: Callable[[str], Any] = _whole


QUOTAS = {
    "concurrent_jobs": Quota("concurrent jobs", "concurrent-jobs", "Maximum number of running jobs"),
    "queued_jobs": Quota("queued jobs", "queued-jobs", "Maximum number of queued jobs"),
    "jobs_per_day": Quota("jobs per day", "jobs-per-day", "Maximum number of jobs created per UTC day"),
    "device_hours_per_month": Quota(
        "device-hours per month", "device-hours", "Maximum device-hours per calendar month", "HOURS", _hours
    ),
    "stored_bytes": Quota("stored bytes", "stored-bytes", "Maximum storage, such as 500MB or 20GB", "BYTES", _bytes),
    "plans_per_day": Quota("plans per day", "plans-per-day", "Maximum number of plans created per UTC day"),
    "tokens_per_day": Quota(
        "inference tokens per day", "tokens-per-day", "Maximum number of tokens of inference requests per UTC day"
    ),
}


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
    is_table = not as_json and not quiet and any(project.organization_id for project in found)  # not in older services
    owners = {one.id: one.name for one in lorry.organizations.list()} if is_table else {}
    columns = (
        Column("NAME", "name"),
        Column("ID", "id"),
        Column("ORGANIZATION", lambda one: owners.get(one.organization_id), min_width=8, priority=1),
        Column("STATUS", "status"),
        Column("WEIGHT", lambda one: f"{one.weight:g}"),
        Column("CREATED", date("created_at"), priority=2),
    )
    listing(found, columns, empty="No projects.", as_json=as_json, quiet=quiet)


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


def update(
    project: ProjectName,
    *,
    name: Annotated[str | None, typer.Option(help="New name. The names of existing adapters don't change.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Fair-share weight, above 0; new projects have 1.", metavar="NUMBER")
    ] = None,
    highest_priority: Annotated[Priority | None, typer.Option(help="Highest priority of the project's jobs.")] = None,
    as_json: AsJson = False,
    **quotas: Any,
) -> None:
    """Update a project's name, weight or limits (operator key required). Omitted settings stay unchanged."""
    limits: dict[str, Any] = {**quotas, "highest_priority": highest_priority and highest_priority.value}
    is_limited = any(limit is not None for limit in limits.values())
    if name is None and weight is None and not is_limited:
        raise typer.BadParameter("pass at least one setting to update.")
    lorry = client()
    given = lookup.project(lorry, project)
    if is_limited:
        lorry.projects.limit(given, **limits)
    if weight is not None:
        lorry.projects.weigh(given, weight)
    # Last, because the project then has a new name.
    updated = lorry.projects.get(given) if name is None else lorry.projects.rename(given, name)
    sentence = f"Updated project {updated.name}. Show it with: lorry projects show {updated.name}"
    output.print_result(updated, sentence, as_json=as_json)


def _add_quotas(function: Callable[..., None]) -> None:
    """Add an option for each quota, after the weight."""
    parameters = parameters_of(function)[:-1]
    for name, quota in QUOTAS.items():
        text = f"{quota.help}, or none for unlimited."
        added = typer.Option(f"--limit-{quota.option}", help=text, metavar=quota.metavar, parser=quota.parser)
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, Annotated[Any, added]
        parameters.insert(-2, inspect.Parameter(name, kind, default=None, annotation=annotation))
    set_parameters(function, parameters)


_add_quotas(update)
app.verb(
    "update",
    "lorry projects update search --name search-team",
    "lorry projects update search --weight 2 --limit-concurrent-jobs 4",
    "lorry projects update search --limit-stored-bytes 20GB --limit-device-hours none",
)(update)


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
    rows = [*map(_limit_row, limits.values()), {"name": "priority", "limit": highest_priority or "any"}]
    fields = {"LIMIT": "name", "MAXIMUM": "limit", "USED": "used", "RESETS": "resets"}
    table([Column(title, name) for title, name in fields.items()], rows, empty="No limits.")


def _limit_row(limit: ProjectLimit) -> dict[str, str | None]:
    maximum, used = (
        None if n is None else output.size(n) if limit.name == "stored_bytes" else f"{n:g}"
        for n in (limit.limit, limit.used)
    )
    title = QUOTAS[limit.name].title if limit.name in QUOTAS else limit.name
    return {"name": title, "limit": maximum or "any", "used": used, "resets": output.briefly(limit.resets_at)}
