"""Writes the output file and the error file of a batch, in OpenAI's format and in the order of the input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from api.inference.batch_input import custom_id_of
from catalog.batches import execution
from catalog.batches.execution import Outcome
from catalog.db.database import Database
from catalog.disk import full_disk_named
from catalog.error_texts import ErrorText
from catalog.errors import LorryError
from catalog.storage.store import ArtifactStore, Blob
from catalog.tables.serving import BatchLine
from catalog.tables.table import Json, new_id

RESULTS_AT_ONCE = 10
"""Results in memory at once. Each may have many megabytes (answer.MAX_KEPT_BYTES)."""
UNANSWERED: dict[Outcome, Json] = {
    "cancelled": {"code": "batch_cancelled", "message": ErrorText.of("batch_cancelled").sentence()},
    "expired": {"code": "batch_expired", "message": ErrorText.of("batch_expired").sentence()},
}
"""Errors of lines without a result."""


class AnswerCrashed(LorryError):
    """A bug of the service has ended the answer."""

    status = 500
    type = "server_error"


def answer_crashed(request_id: str) -> AnswerCrashed:
    return AnswerCrashed("internal_error", request_id=request_id)


def success_result(custom_id: str, request_id: str, body: str) -> Json:
    """body: the response as JSON."""
    return _result(custom_id, {"status_code": 200, "request_id": request_id, "body": json.loads(body)}, None)


def failure_result(custom_id: str | None, error: LorryError, request_id: str) -> Json:
    """Return the result of a request that was rejected or failed, with the error as its response."""
    told = {"message": error.sentence(), "type": error.type, "param": error.param, "code": error.code}
    response = {"status_code": error.status, "request_id": request_id, "body": {"error": told}}
    return _result(custom_id, response, None)


def _result(custom_id: str | None, response: Json | None, error: Json | None) -> Json:
    return {"id": new_id("batch_req"), "custom_id": custom_id, "response": response, "error": error}


class OutputFiles:
    """The two files, in a folder for temporary files until they are stored."""

    def __init__(self, folder: Path, name: str) -> None:
        self._paths = (folder / f"{name}.output", folder / f"{name}.error")
        self._folder = folder

    def __enter__(self) -> Self:
        with full_disk_named():
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._paths:
                path.write_bytes(b"")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)

    def write(self, db: Database, batch_id: str, lines: Iterable[tuple[int, bytes]], *, unanswered: Json) -> None:
        """Write one line for each line of the input. `unanswered`: the error of a line without a result.

        Raises Unavailable, OutOfSpace, and DamagedArtifact if the input can't be read.
        """
        results = _Results(db, batch_id)
        with full_disk_named(), self._paths[0].open("wb") as output, self._paths[1].open("wb") as failures:
            for number, line in lines:
                found = results.find(number)
                if found is not None:
                    _write(failures if found.is_failed else output, found.result)
                else:
                    _write(failures, _result(custom_id_of(line), None, unanswered))

    def write_results(self, db: Database, batch_id: str) -> None:
        """Write the results, in the order of the input. Raises Unavailable, OutOfSpace."""
        with full_disk_named(), self._paths[0].open("wb") as output, self._paths[1].open("wb") as failures:
            for found in _Results(db, batch_id).all():
                _write(failures if found.is_failed else output, found.result)

    def stored(self, store: ArtifactStore) -> tuple[Blob | None, Blob | None]:
        """Store the files, and return their blobs; None for an empty one. Raises Unavailable, OutOfSpace."""
        output, failures = (store.put_file(path) if path.stat().st_size else None for path in self._paths)
        return output, failures


class _Results:
    """The stored results of a batch, read in the order of the lines."""

    def __init__(self, db: Database, batch_id: str) -> None:
        self._db, self._batch_id = db, batch_id
        self._read: dict[int, BatchLine] = {}
        self._last = 0
        self._is_over = False

    def find(self, number: int) -> BatchLine | None:
        """Return the result of a line. Numbers must increase."""
        while self._last < number and not self._is_over:
            self._read = {line.number: line for line in self._some()}
        return self._read.get(number)

    def all(self) -> Iterator[BatchLine]:
        """Yield the results. Use it without `find`."""
        while not self._is_over:
            yield from self._some()

    def _some(self) -> list[BatchLine]:
        some = execution.results(self._db, self._batch_id, after=self._last, limit=RESULTS_AT_ONCE)
        self._is_over = len(some) < RESULTS_AT_ONCE
        self._last = some[-1].number if some else self._last
        return some


def _write(file: IO[bytes], result: Json) -> None:
    file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
