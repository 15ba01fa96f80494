"""The files that a command names, uploaded for what it makes of them, and deleted again where that is refused."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorry.cli.commands.files import upload_with_bar
from lorry.cli.render import output
from lorry.errors import APIError, LorryError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from lorry.client import Lorry
    from lorry.models.jobs import File


@contextmanager
def send_with_files(
    lorry: Lorry, model: str, given: Mapping[str, str], *, kept_seconds: int | None = None
) -> Generator[Mapping[str, str]]:
    """The ids of what is given, paths or ids, by what a person typed them for. model: looked at before an upload.

    kept_seconds: so long, what is uploaded; None: until somebody deletes it.
    """
    sources = {name: _path_or_id(path_or_id, name) for name, path_or_id in given.items()}
    if any(isinstance(source, Path) for source in sources.values()):
        _check_model(lorry, model)
    with _uploaded(lorry, sources, kept_seconds) as ids:
        yield ids


def _path_or_id(given: str, name: str) -> Path | str:
    """A path that is there wins over an id that looks like it."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if given.startswith("file-") and "/" not in given:
        return given
    raise typer.BadParameter(
        f"{given!r} is neither a file here nor the id of an uploaded one (file-…).", param_hint=name
    )


def _check_model(lorry: Lorry, name: str) -> None:
    """A misspelt name must not cost an upload; what else may be wrong with a model is the service's to say.

    So is the name itself, where the key may not look models up: what is sent needs no such scope.
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
    lorry: Lorry, sources: Mapping[str, Path | str], kept_seconds: int | None
) -> Generator[Mapping[str, str]]:
    """The ids of the files. What was uploaded for a job that the service refuses is deleted again.

    Where the connection is lost, or the service fails, the job may be there all the same: then they stay.
    """
    uploaded: list[str] = []
    ids: dict[str, str] = {}
    try:
        for name, source in sources.items():
            if isinstance(source, Path):
                file = _upload(lorry, source, name, kept_seconds)
                uploaded.append(file.id)
                ids[name] = _earlier(lorry, file, source, uploaded) or file.id
            else:
                ids[name] = source
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


def _earlier(lorry: Lorry, file: File, path: Path, uploaded: list[str]) -> str | None:
    """The id of a file that holds the same and stays, instead of which no second is kept."""
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
    output.say(f"{path.name} was uploaded before, as {earlier.id}: that is used.")
    return earlier.id


def _delete_again(lorry: Lorry, file_id: str) -> None:
    try:
        lorry.files.delete(file_id)
    except LorryError as error:
        output.say(f"{file_id} was uploaded for this job and stays: {error.message}")
    else:
        output.say(f"{file_id}, uploaded for this job, is deleted again.")
