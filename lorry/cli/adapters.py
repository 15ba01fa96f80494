"""`lorry adapters`: what was trained; download it, check it, trace it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lorry.cli import output
from lorry.cli.app import EXIT_REFUSED, client, group
from lorry.cli.files import byte_bar, flatten
from lorry.cli.output import AsJson
from lorry.cli.tables import Column, table

app = group("Trained adapters.")

Name = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's name or id.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Newest first."""
    adapters = list(client().adapters.list(limit=limit))
    if as_json:
        return output.print_json([adapter.raw for adapter in adapters])
    rows = [
        (
            a.name,
            a.base_model,
            a.rank,
            output.size(a.bytes),
            a.evaluation.base_loss,
            a.evaluation.loss,
            a.verification.passed,
        )
        for a in adapters
    ]
    columns = (
        Column(title="NAME"),
        Column(title="BASE", goes=6, narrowest=12),
        Column(title="RANK", goes=5),
        Column(title="SIZE", goes=4),
        Column(title="BASE LOSS", goes=3),
        Column(title="LOSS", goes=1),
        Column(title="VERIFIED", goes=2),
    )
    return table(columns, rows, empty="There is no adapter yet. A job that succeeds makes one.")


@app.command()
def show(adapter: Name, as_json: AsJson = False) -> None:
    """One adapter, with what its verification measured."""
    found = client().adapters.get(adapter)
    if as_json:
        output.print_json(found.raw)
    else:
        output.pairs(flatten(found.raw))


@app.command()
def pull(
    adapter: Name,
    directory: Annotated[Path | None, typer.Argument(help="Where to; a new folder. Default: ./NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download, checking every digest; PEFT loads the folder as it is."""
    lorry = client()
    target = directory or Path(folder_name(lorry.adapters.get(adapter).name))
    with byte_bar(f"Pulling {adapter}") as on_progress:
        path = lorry.adapters.pull(adapter, target, on_progress=on_progress)
    if as_json:
        output.print_json({"object": "adapter.folder", "path": str(path.resolve())})
    else:
        output.console().print(str(path), soft_wrap=True)


@app.command()
def verify(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER|FOLDER", help="A name or id, or a pulled folder (offline).")
    ],
    as_json: AsJson = False,
) -> None:
    """Check bytes against digests, and the lineage record against its id. Exit code 1 if something is off."""
    if Path(adapter).is_dir():
        from lorry.folder import verify_folder

        result = verify_folder(Path(adapter))
    else:
        result = client().adapters.verify(adapter)
    problems: list[str] = result.get("problems") or []
    if as_json:
        output.print_json(result)
    else:
        for problem in problems:
            output.say(problem)
        output.say(
            f"{adapter}: {'it is what its record says' if result.get('passed') else 'NOT what its record says'}."
        )
    if not result.get("passed"):
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def lineage(adapter: Name, as_json: AsJson = False) -> None:
    """Where it comes from: base, data, configuration, attempts, code, results."""
    record = client().adapters.lineage(adapter)
    if as_json:
        output.print_json(record)
    else:
        output.pairs(flatten(record))


def folder_name(name: str) -> str:
    """A name of the service as one harmless part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "adapter"
