"""`lorry adapters share`, `shares`, `unshare`: for operators, who else may read an adapter or a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from lorry.cli.app import client
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table

Name = Annotated[str, typer.Argument(metavar="ADAPTER", help="The name of an adapter or of a checkpoint.")]


def share(
    adapter: Name,
    projects: Annotated[list[str], typer.Argument(metavar="PROJECT…", help="Names or ids of projects.")],
    as_json: AsJson = False,
) -> None:
    """Let other projects read, download and continue it; they see nothing else of its job. For operators."""
    given = client().adapters.share(adapter, projects)
    if as_json:
        return output.print_json([permission.raw for permission in given])
    return output.say(f"{', '.join(projects)} may read {adapter}. `lorry adapters unshare` takes it back.")


def shares(adapter: Name, as_json: AsJson = False) -> None:
    """Who else may read it, newest first. For operators."""
    given = list(client().adapters.permissions(adapter))
    if as_json:
        return output.print_json([permission.raw for permission in given])
    rows = [(one.id, one.project_id, output.briefly(one.created_at)) for one in given]
    columns = Column(title="PERMISSION"), Column(title="PROJECT"), Column(title="SINCE", goes=1)
    return table(columns, rows, empty="No other project may read it.")


def unshare(
    adapter: Name,
    permission: Annotated[str, typer.Argument(help="The permission's id; `shares` lists them.")],
    _yes: YesTaken = False,
) -> None:
    """Take a permission back. Jobs that began with the adapter go on. For operators."""
    client().adapters.unshare(adapter, permission)
    output.say(f"{permission} is taken back.")
