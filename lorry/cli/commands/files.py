"""`lorry files`: data sets, what preparation found in them, and the curves of jobs."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.app import client, group
from lorry.cli.render import output
from lorry.cli.render.output import AsJson, YesTaken
from lorry.cli.render.tables import Column, table

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from lorry.client import Lorry
    from lorry.models.jobs import File
    from lorry.resources.files import OnBytes

app = group("Data sets, and the curves of jobs.")


def _seconds(time: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([smhd])", time)
    if found is None:
        raise typer.BadParameter("Say a number and its unit (s, m, h or d), such as 12h or 30d.")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="JSON Lines.")],
    purpose: Annotated[str, typer.Option(help="fine-tune, unless you know better.")] = "fine-tune",
    expires_after: Annotated[
        int | None,
        typer.Option(parser=_seconds, metavar="<duration>", help="Let it go by itself, such as after 12h or 30d."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file; every line is checked."""
    file = upload_with_bar(client(), path, purpose=purpose, expires_after_seconds=expires_after)
    if as_json:
        output.print_json(file.raw)
    else:
        output.console().print(file.id)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    purpose: Annotated[str | None, typer.Option(help="Only these: fine-tune, fine-tune-results, user_data.")] = None,
    as_json: AsJson = False,
) -> None:
    """Uploaded files and the curves of jobs, newest first."""
    files = list(client().files.list(limit=limit, purpose=purpose))
    if as_json:
        return output.print_json([file.raw for file in files])
    rows = [
        (
            f.id,
            f.filename,
            output.size(f.bytes),
            f.kind,
            f.purpose,
            output.briefly(f.created_at),
            output.briefly(f.expires_at),
        )
        for f in files
    ]
    columns = (
        Column(title="ID"),
        Column(title="NAME", narrowest=16),
        Column(title="SIZE", goes=1),
        Column(title="KIND", goes=2),
        Column(title="PURPOSE", goes=4),
        Column(title="CREATED", goes=3),
        Column(title="EXPIRES", goes=5),
    )
    if not any(file.expires_at for file in files):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return table(columns, rows, empty="There is no file yet. Upload one with `lorry files upload PATH`.")


@app.command()
def download(
    file_id: Annotated[str, typer.Argument(help="The file's id.")],
    path: Annotated[
        Path | None, typer.Argument(allow_dash=True, help="A new file, or - for standard output. Default: ./NAME.")
    ] = None,
) -> None:
    """Save the bytes of a file: of an upload, or of a job's curves."""
    files = client().files
    if path == Path("-"):
        for piece in files.content(file_id):
            sys.stdout.buffer.write(piece)
    else:
        output.console().print(str(files.download(file_id, path)), soft_wrap=True)


@app.command()
def report(
    file_id: Annotated[str, typer.Argument(help="The file's id.")],
    model: Annotated[str, typer.Option(help="The base model whose tokenizer counts.")],
    as_json: AsJson = False,
) -> None:
    """Rows, tokens, truncated rows, rows with nothing to learn, duplicates."""
    found = client().files.report(file_id, model=model)
    if as_json:
        output.print_json(found)
    elif not found.get("report"):
        output.say(f"No worker has prepared {file_id} for {model} yet, so there is nothing to report.")
        output.say(f"A job prepares it: lorry jobs submit {model} {file_id}")
    else:
        from lorry.cli.render.lineage import prepared

        output.pairs((("file", file_id), ("model", model), *prepared(found["report"])))


@app.command()
def delete(
    file_id: Annotated[str, typer.Argument(help="The file's id.")],
    _yes: YesTaken = False,
    as_json: AsJson = False,
) -> None:
    """Delete an uploaded file."""
    client().files.delete(file_id)
    if as_json:
        output.print_json({"id": file_id, "deleted": True})
    else:
        output.say(f"{file_id} is deleted.")


def upload_with_bar(
    lorry: Lorry,
    path: Path,
    *,
    purpose: str = "fine-tune",
    expires_after_seconds: int | None = None,
    reuses: bool = False,
) -> File:
    """Uploads with a bar on stderr, where that is a terminal. reuses: the caller takes an earlier one of the same
    content, and says so."""
    with byte_bar(f"Uploading {path.name}") as on_progress:
        file = lorry.files.upload(
            path, purpose=purpose, expires_after_seconds=expires_after_seconds, on_progress=on_progress
        )
    if file.same_content_as is not None and not reuses:
        output.say(f"{path.name} was there already, as {file.same_content_as}; it is kept a second time, as {file.id}.")
    return file


@contextmanager
def byte_bar(label: str) -> Generator[OnBytes | None]:
    """A bar of bytes that goes away when it is full."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=output.messages(), transient=True) as progress:
        task = progress.add_task(output.clean(label), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested objects as dotted labels."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from flatten(inner, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        elif name != "object":
            yield f"{prefix}{name}", inner
