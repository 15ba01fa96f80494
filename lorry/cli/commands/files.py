"""`lorry files`: data sets, the reports of their preparation, and the curves of jobs."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli import lookup
from lorry.cli.app import client, group
from lorry.cli.parsing.durations import duration
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, Quiet, Yes
from lorry.cli.render.tables import Column, date, listing

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from lorry.client import Lorry
    from lorry.models import File
    from lorry.resources.files import OnBytes

app = group("Manage data sets and the result files of jobs.")
FileId = Annotated[str, typer.Argument(metavar="FILE", help="ID of the file, or a unique prefix of it.")]
NOT_PREPARED = "No worker has prepared {file} for {model} yet. A job prepares it: lorry jobs submit {model} {file}"


class Purpose(StrEnum):
    """The purposes of an upload."""

    fine_tune = "fine-tune"
    batch = "batch"
    user_data = "user_data"


class ListedPurpose(StrEnum):
    """The purposes of a file."""

    fine_tune = "fine-tune"
    results = "fine-tune-results"
    batch = "batch"
    batch_output = "batch_output"
    user_data = "user_data"


@app.verb(
    "upload",
    "lorry files upload chats.jsonl",
    "lorry files upload chats.jsonl --expires-after 30d",
    "lorry files upload notes.pdf --purpose user_data",
)
def upload(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", exists=True, dir_okay=False, readable=True, help="File to upload; training data is JSONL."
        ),
    ],
    purpose: Annotated[Purpose, typer.Option(help="Purpose of the file.")] = Purpose.fine_tune,
    expires_after: Annotated[
        int | None,
        duration("Delete the file automatically after this time, such as 12h or 30d; 1h to 30d (default: never)."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Upload a file. Every line of training data is checked."""
    file = upload_with_bar(client(), path, purpose=purpose.value, expires_after_seconds=expires_after, reuses=quiet)
    if as_json:
        output.print_json(file.raw)
    else:
        output.print_ids([file.id])


@app.verb("list", "lorry files list", "lorry files list --purpose fine-tune-results", "lorry files list -q --limit 5")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of files to list.")] = 50,
    purpose: Annotated[ListedPurpose | None, typer.Option(help="Show only files with this purpose.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List uploaded files and the curves of jobs, newest first."""
    columns = (
        Column("ID", "id"),
        Column("NAME", "filename", min_width=16),
        Column("SIZE", lambda file: output.size(file.bytes), priority=1),
        Column("KIND", "kind", priority=2),
        Column("PURPOSE", "purpose", priority=4),
        Column("CREATED", date("created_at"), priority=3),
        Column("EXPIRES", date("expires_at"), priority=5, is_optional=True),
    )
    files = client().files.list(limit=limit, purpose=purpose and purpose.value)
    empty = "No files yet. Upload one with `lorry files upload PATH`."
    listing(files, columns, empty=empty, as_json=as_json, quiet=quiet)


@app.verb("show", "lorry files show file-3f2b", "lorry files show file-3f2b --json")
def show(file_id: FileId, as_json: AsJson = False) -> None:
    """Show a file's details."""
    lorry = client()
    file = lorry.files.get(lookup.file(lorry, file_id))
    output.print_facts(file, _facts(file), as_json=as_json)


@app.verb(
    "download",
    "lorry files download file-3f2b",
    "lorry files download file-3f2b curves.csv",
    "lorry files download file-3f2b - | head",
)
def download(
    file_id: FileId,
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", allow_dash=True, help="New file, or - for stdout (default: ./NAME)."),
    ] = None,
) -> None:
    """Download an uploaded file or the curves of a job."""
    lorry = client()
    file_id = lookup.file(lorry, file_id)
    if path == Path("-"):
        for piece in lorry.files.content(file_id):
            sys.stdout.buffer.write(piece)
    else:
        output.console().print(str(lorry.files.download(file_id, path)), soft_wrap=True)


@app.verb(
    "report",
    "lorry files report file-3f2b --model smollm2",
    "lorry files report file-3f2b --model smollm2 --json",
)
def report(
    file_id: FileId,
    model: Annotated[str, typer.Option(help="Base model whose tokenizer counts the tokens.")],
    as_json: AsJson = False,
) -> None:
    """Show rows, tokens, truncated rows, rows without trainable tokens, and duplicates of a file."""
    lorry = client()
    file_id = lookup.file(lorry, file_id)
    found = lorry.files.report(file_id, model=model)
    if as_json:
        output.print_json(found)
    elif not found.get("report"):
        output.echo(NOT_PREPARED.format(file=file_id, model=model))
    else:
        from lorry.cli.render.lineage import prepared

        output.pairs((("file", file_id), ("model", model), *prepared(found["report"])))


@app.verb("delete", "lorry files delete file-3f2b", "lorry files delete file-3f2b --yes")
def delete(file_id: FileId, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a file. This can't be undone."""
    lorry = client()
    file_id = lookup.file(lorry, file_id)
    output.confirm(f"Delete file {file_id}? This can't be undone.", yes=yes)
    lorry.files.delete(file_id)
    output.print_deleted("file", file_id, as_json=as_json)


def _facts(file: File) -> Iterator[tuple[str, object]]:
    yield "id", file.id
    yield "name", file.filename
    yield "purpose", file.purpose
    yield "status", file.status
    yield "size", output.size(file.bytes)
    yield "rows", file.rows
    yield "kind of rows", file.kind
    yield "digest", file.digest
    yield "created", output.when(file.created_at or None)
    yield "expires", output.when(file.expires_at)


def upload_with_bar(
    lorry: Lorry,
    path: Path,
    *,
    purpose: str = "fine-tune",
    expires_after_seconds: int | None = None,
    reuses: bool = False,
) -> File:
    """Upload a file, with a progress bar if stderr is a terminal.

    reuses: don't print that an earlier file has the same content.
    """
    with byte_bar(f"Uploading {path.name}") as on_progress:
        file = lorry.files.upload(
            path, purpose=purpose, expires_after_seconds=expires_after_seconds, on_progress=on_progress
        )
    if file.same_content_as is not None and not reuses:
        output.echo(
            f"{path.name} has the same content as {file.same_content_as}; a second copy is stored as {file.id}."
        )
    return file


@contextmanager
def byte_bar(label: str) -> Generator[OnBytes | None]:
    """Show a progress bar of bytes, which is removed at the end."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=output.messages(), transient=True) as progress:
        task = progress.add_task(output.clean(label), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested objects with dotted labels."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from flatten(inner, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        elif name != "object":
            yield f"{prefix}{name}", inner
