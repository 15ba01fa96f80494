"""`lorry organizations`: groups of projects that share no models with each other."""

from __future__ import annotations

from typing import Annotated

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet
from lorry.cli.render.tables import Column, date, listing

app = group("Manage organizations.")
OrganizationName = Annotated[
    str, typer.Argument(metavar="ORGANIZATION", help="Name of the organization, its ID, or a unique prefix of the ID.")
]


@app.verb("create", "lorry organizations create research", "lorry organizations create research -q")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name: letters, digits, dots, underscores and hyphens.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Create an organization (operator key required)."""
    made = client().organizations.create(name)
    if quiet:
        return output.print_ids([made.id])
    following = f"lorry projects create NAME --organization {made.name}"
    sentence = f"Created organization {made.name}. Create a project in it: {following}"
    return output.print_result(made, sentence, as_json=as_json)


@app.verb("list", "lorry organizations list", "lorry organizations list --json")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List your organization or, with an operator key, all organizations."""
    columns = Column("NAME", "name"), Column("ID", "id"), Column("CREATED", date("created_at"))
    listing(client().organizations.list(), columns, empty="No organizations.", as_json=as_json, quiet=quiet)


@app.verb("show", "lorry organizations show research", "lorry organizations show org-3f2b --json")
def show(organization: OrganizationName, as_json: AsJson = False) -> None:
    """Show an organization's details."""
    lorry = client()
    found = lorry.organizations.get(lookup.organization(lorry, organization))
    facts = ("name", found.name), ("id", found.id), ("created", output.when(found.created_at))
    output.print_facts(found, (*facts, ("created by", found.created_by)), as_json=as_json)


@app.verb(
    "update",
    "lorry organizations update research --name science",
    "lorry organizations update org-3f2b --name science --json",
)
def update(
    organization: OrganizationName,
    name: Annotated[str, typer.Option(help="New name.")],
    as_json: AsJson = False,
) -> None:
    """Rename an organization (operator key required). The names of its projects don't change."""
    lorry = client()
    renamed = lorry.organizations.rename(lookup.organization(lorry, organization), name)
    output.print_result(renamed, f"Renamed organization {organization} to {renamed.name}.", as_json=as_json)
