"""Upload of the local files of a job or sweep; they are deleted again if the service rejects it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorry.cli import lookup
from lorry.cli.commands.files import upload_with_bar
from lorry.cli.render import output
from lorry.errors import APIError, LorryError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from lorry.client import Lorry
    from lorry.models import File


@contextmanager
def send_with_files(
    lorry: Lorry, model: str, given: Mapping[str, str], *, kept_seconds: int | None = None, quiet: bool = False
) -> Generator[Mapping[str, str]]:
    """Yield the ids of files that are given as paths or ids, by the argument that they were passed for.

    model: checked before an upload. kept_seconds: the time after which uploaded files are deleted; None: they are
    kept. quiet: print no messages about reused files.
    """
    sources = {name: _path_or_id(path_or_id, name) for name, path_or_id in given.items()}
    if any(isinstance(source, Path) for source in sources.values()):
        _check_model(lorry, model)
    with _uploaded(lorry, sources, kept_seconds, quiet) as ids:
        yield ids


def _path_or_id(given: str, name: str) -> Path | str:
    """An existing path takes precedence over an id."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if given.startswith("file-") and "/" not in given:
        return given
    raise typer.BadParameter(
        f"{given!r} is neither an existing file nor the ID of an uploaded one (file-…).", param_hint=name
    )


def _check_model(lorry: Lorry, name: str) -> None:
    """Reject an unknown model before an upload. The service checks the rest.

    A key without the scope to read models may still submit a job: then the service checks the name too.
    """
    try:
        lorry.models.get(name)
    except APIError as error:
        if error.code == "missing_scope":
            return
        error.param = "MODEL"
        raise


@contextmanager
def _uploaded(
    lorry: Lorry, sources: Mapping[str, Path | str], kept_seconds: int | None, quiet: bool
) -> Generator[Mapping[str, str]]:
    """Yield the ids of the files. Files uploaded for a rejected job are deleted again.

    If the connection is lost or the service fails, the job may exist: then the files are kept.
    """
    uploaded: list[str] = []
    ids: dict[str, str] = {}
    try:
        for name, source in sources.items():
            if isinstance(source, Path):
                file = _upload(lorry, source, name, kept_seconds)
                uploaded.append(file.id)
                ids[name] = _earlier(lorry, file, source, uploaded, quiet=quiet) or file.id
            else:
                ids[name] = lookup.file(lorry, source)
        yield ids
    except APIError as error:
        if 400 <= error.status < 500 and error.status != 408:
            for file_id in uploaded:
                _delete_again(lorry, file_id)
        raise


def _upload(lorry: Lorry, path: Path, name: str, kept_seconds: int | None) -> File:
    try:
        return upload_with_bar(lorry, path, expires_after_seconds=kept_seconds, reuses=True)
    except APIError as error:
        error.param = name
        raise


def _earlier(lorry: Lorry, file: File, path: Path, uploaded: list[str], *, quiet: bool) -> str | None:
    """Return the id of an existing file with the same content, and delete the new copy; None if there is none."""
    if file.same_content_as is None:
        return None
    try:
        earlier = lorry.files.get(file.same_content_as)
        if earlier.purpose != file.purpose or earlier.expires_at is not None:
            return None
        lorry.files.delete(file.id)
    except APIError:
        return None
    uploaded.remove(file.id)
    if not quiet:
        output.echo(f"{path.name} is already uploaded as {earlier.id}; using that file.")
    return earlier.id


def _delete_again(lorry: Lorry, file_id: str) -> None:
    try:
        lorry.files.delete(file_id)
    except LorryError as error:
        output.echo(f"File {file_id} was uploaded for this job and could not be deleted: {error.message}")
    else:
        output.echo(f"Deleted file {file_id}, which was uploaded for this job.")
