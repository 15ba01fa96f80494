"""`lorry projects`: whose things are whose, and how much of everything each may have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorry.cli.app import client, group
from lorry.cli.parsing.option_values import Priority
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.models.accounts import Project, ProjectLimit

app = group("Projects: whose files, jobs and adapters are whose.")
ProjectName = Annotated[str, typer.Argument(help="The project's name or id.")]
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
NAMES = {
    "concurrent_jobs": "jobs at once",
    "queued_jobs": "jobs that wait",
    "jobs_per_day": "jobs a day",
    "device_hours_per_month": "device-hours a month",
    "stored_bytes": "stored bytes",
    "plans_per_day": "plans a day",
}


@app.command("create")
def create_project(
    name: Annotated[str, typer.Argument(help="Letters, digits, dot, underscore and hyphen.")],
    organization: Annotated[str | None, typer.Option(help="Another than yours, by name or id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a project (an operator's key only)."""
    project = client().projects.create(name, organization=organization)
    sentence = f"{project.name} is made. Give it a key: lorry keys create NAME --project {project.name}"
    _print_result(project, sentence, as_json)


@app.command("list")
def list_projects(
    archived: Annotated[bool, typer.Option("--archived", help="Those that were archived, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Your project; for operators, all."""
    lorry = client()
    found = list(lorry.projects.list(archived=archived))
    if as_json:
        return output.print_json([project.raw for project in found])
    has_owners = any(project.organization_id for project in found)  # not of an older service
    owners = {one.id: one.name for one in lorry.organizations.list()} if has_owners else {}
    rows = [
        (p.name, p.id, owners.get(p.organization_id), p.status, f"{p.weight:g}", output.briefly(p.created_at))
        for p in found
    ]
    columns = (
        Column(title="NAME"),
        Column(title="ID"),
        Column(title="ORGANIZATION", narrowest=8, goes=1),
        Column(title="STATUS"),
        Column(title="WEIGHT"),
        Column(title="CREATED", goes=2),
    )
    return table(columns, rows, empty="There is no project.")


@app.command("rename")
def rename_project(
    project: ProjectName, name: Annotated[str, typer.Argument(help="Its new name.")], as_json: AsJson = False
) -> None:
    """Give a project another name (an operator's key only). Its adapters keep theirs."""
    renamed = client().projects.rename(project, name)
    _print_result(renamed, f"{output.clean(project)} is {renamed.name} now.", as_json)


@app.command("weigh")
def weigh_project(
    project: ProjectName,
    weight: Annotated[float, typer.Argument(help="Above 0; 1 is that of a project that was given none.")],
    as_json: AsJson = False,
) -> None:
    """Give a project its part of the devices, beside others whose jobs wait (an operator's key only)."""
    weighed = client().projects.weigh(project, weight)
    _print_result(weighed, f"{weighed.name} has the weight {weighed.weight:g} now.", as_json)


@app.command("archive")
def archive_project(
    project: ProjectName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a project away (an operator's key only): its keys open nothing, and what it has stays."""
    output.confirm(f"Archive {project}, so that none of its keys opens anything?", yes=yes)
    archived = client().projects.archive(project)
    sentence = f"{archived.name} is archived. Bring it back: lorry projects restore {archived.name}"
    _print_result(archived, sentence, as_json)


@app.command("restore")
def restore_project(project: ProjectName, _yes: YesTaken = False, as_json: AsJson = False) -> None:
    """Bring a project back (an operator's key only)."""
    restored = client().projects.restore(project)
    _print_result(restored, f"{restored.name} is open again.", as_json)


@app.command("limit")
def limit_project(
    project: ProjectName,
    *,
    concurrent_jobs: Annotated[str | None, typer.Option(help="Jobs that train at once; more wait. Or: none.")] = None,
    queued_jobs: Annotated[str | None, typer.Option(help="Jobs that wait.")] = None,
    jobs_per_day: Annotated[str | None, typer.Option(help="Jobs created in a day (UTC).")] = None,
    device_hours: Annotated[str | None, typer.Option(help="Device-hours of a calendar month.")] = None,
    stored_bytes: Annotated[str | None, typer.Option(help="Of all that it stores: 500MB, 20GB.")] = None,
    plans_per_day: Annotated[str | None, typer.Option(help="Plans created in a day (UTC).")] = None,
    highest_priority: Annotated[Priority | None, typer.Option(help="Highest priority of its jobs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a project may use at most (an operator's key only), or show it and what is used.

    What is left out stays as it is; none: without limit.
    """
    given = {
        "concurrent_jobs": _whole(concurrent_jobs),
        "queued_jobs": _whole(queued_jobs),
        "jobs_per_day": _whole(jobs_per_day),
        "device_hours_per_month": _hours(device_hours),
        "stored_bytes": _bytes(stored_bytes),
        "plans_per_day": _whole(plans_per_day),
        "highest_priority": None if highest_priority is None else highest_priority.value,
    }
    projects = client().projects
    asked = {name: value for name, value in given.items() if value is not None}
    found = projects.limit(project, **asked) if asked else projects.limits(project)  # pyright: ignore[reportArgumentType]
    if as_json:
        return output.print_json([limit.raw for limit in found.values()])
    titles = ("LIMIT", "AT MOST", "USED", "BEGINS ANEW")
    rows = [*map(_row, found.values()), ("priority", projects.get(project).highest_priority or "any", None, None)]
    return table([Column(title=title) for title in titles], rows, empty="It has no limits.")


def _print_result(project: Project, sentence: str, as_json: bool) -> None:
    if as_json:
        output.print_json(project.raw)
    else:
        output.say(sentence)


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
        raise typer.BadParameter(f"{text!r} is neither a number nor the word none.")
    return int(text)


def _hours(text: str | None) -> float | Literal["none"] | None:
    if text is None or text == "none":
        return text
    if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text):
        raise typer.BadParameter(f"{text!r} is neither a number of hours nor the word none.")
    return float(text)


def _bytes(text: str | None) -> int | Literal["none"] | None:
    if text is None or text == "none":
        return text
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?(B|kB|MB|GB|TB)?", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no number of bytes: write 500MB, 20GB or none.")
    return int(float(found[1]) * UNITS[found[2] or ""])
