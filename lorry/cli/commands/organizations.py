"""`lorry organizations`: whose projects are whose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from lorry.models.accounts import Organization

app = group("Organizations: whose projects are whose.")


@app.command("create")
def create_organization(
    name: Annotated[str, typer.Argument(help="Letters, digits, dot, underscore and hyphen.")], as_json: AsJson = False
) -> None:
    """Make an organization (an operator's key only)."""
    made = client().organizations.create(name)
    _print_result(
        made, f"{made.name} is made. Give it a project: lorry projects create NAME --organization {made.name}", as_json
    )


@app.command("list")
def list_organizations(as_json: AsJson = False) -> None:
    """Your organization; for operators, all."""
    found = list(client().organizations.list())
    if as_json:
        return output.print_json([one.raw for one in found])
    rows = [(one.name, one.id, output.briefly(one.created_at)) for one in found]
    return table([Column(title=title) for title in ("NAME", "ID", "CREATED")], rows, empty="There is no organization.")


@app.command("rename")
def rename_organization(
    organization: Annotated[str, typer.Argument(help="The organization's name or id.")],
    name: Annotated[str, typer.Argument(help="Its new name.")],
    as_json: AsJson = False,
) -> None:
    """Give an organization another name (an operator's key only). Its projects keep theirs."""
    renamed = client().organizations.rename(organization, name)
    _print_result(renamed, f"{output.clean(organization)} is {renamed.name} now.", as_json)


def _print_result(organization: Organization, sentence: str, as_json: bool) -> None:
    if as_json:
        output.print_json(organization.raw)
    else:
        output.say(sentence)
