"""Reads and validates the input file of a batch: one request as JSON on each line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from api.errors.validation import explain
from api.inference.batch_schemas import BatchInputLine
from api.inference.calls import CompletionCall, chat_call, text_call
from api.schemas.inference import ChatCompletionRequest, CompletionRequest
from catalog.datasets.row_json import BadRow, NotObject, parse_object
from catalog.datasets.validator import BYTE_ORDER_MARK
from catalog.db.database import Database
from catalog.errors import InvalidRequest, LorryError
from catalog.inference import requests
from catalog.tables.table import Json

MAX_LINES = 50_000
"""Maximum number of requests of a batch, as in OpenAI's API."""
MAX_ERRORS = 100
"""Maximum number of errors of a batch that failed."""
SCHEMAS = {"/v1/chat/completions": ChatCompletionRequest, "/v1/completions": CompletionRequest}


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchEntry:
    """A valid line."""

    custom_id: str
    model: str
    call: CompletionCall


def lines_of(chunks: Iterable[bytes], *, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the content of each line that is not blank. Numbers count all lines, from 1. A byte order
    mark at the start is skipped.

    Of a longer line only the beginning is yielded: `max_line_bytes` and one more byte.
    """
    number, start, is_cut = 1, b"", False
    for chunk in _without_mark(chunks):
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield from _line(number, start if is_cut else start + line, max_line_bytes)
            number, start, is_cut = number + 1, b"", False
        if not is_cut:
            start += rest
            is_cut = len(start) > max_line_bytes
    yield from _line(number, start, max_line_bytes)


def _without_mark(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest, start = iter(chunks), b""
    while len(start) < len(BYTE_ORDER_MARK) and (chunk := next(rest, b"")):
        start += chunk
    yield start.removeprefix(BYTE_ORDER_MARK)
    yield from rest


def _line(number: int, line: bytes, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    if line.strip():
        yield number, line[: max_line_bytes + 1]


def parse(line: bytes, *, endpoint: str, max_line_bytes: int) -> BatchEntry:
    """Return the request of a line. Raises InvalidRequest, whose `param` is a path in the line."""
    if len(line) > max_line_bytes:
        raise InvalidRequest("batch_line_too_long", max_line_bytes=max_line_bytes)
    try:
        row = parse_object(line)
    except BadRow as error:
        raise _bad_row(error) from error
    try:
        given = BatchInputLine.model_validate(row)
    except ValidationError as error:
        raise _invalid(error, row) from error
    if given.url != endpoint:
        raise InvalidRequest("mismatched_endpoint", url=given.url[:80], endpoint=endpoint, param="url")
    return _entry(given, row)


def custom_id_of(line: bytes) -> str | None:
    """Return the custom_id of a line that was valid, or None if the current limits prevent reading it."""
    try:
        return str(parse_object(line)["custom_id"])
    except (BadRow, KeyError):
        return None


def _entry(given: BatchInputLine, row: Json) -> BatchEntry:
    try:
        body = SCHEMAS[given.url].model_validate(given.body)
    except ValidationError as error:
        raise _invalid(error, row, "body") from error
    if body.stream or body.stream_options is not None:
        raise InvalidRequest("stream_in_batch", param="body.stream")
    try:
        call = chat_call(body) if isinstance(body, ChatCompletionRequest) else text_call(body)
    except InvalidRequest as error:
        param = f"body.{error.param}" if error.param else "body"
        raise InvalidRequest(error.text, param=param) from error
    return BatchEntry(custom_id=given.custom_id, model=body.model, call=call)


def _bad_row(error: BadRow) -> InvalidRequest:
    if isinstance(error, NotObject):
        return InvalidRequest("batch_line_not_object")
    message = error.text.message
    return InvalidRequest(replace(error.text, message=message[:1].upper() + message[1:]))


def _invalid(error: ValidationError, row: Json, *within: str) -> InvalidRequest:
    problems = [{**problem, "loc": ("body", *within, *problem["loc"])} for problem in error.errors()]
    return explain(problems, body=row)


@dataclass(kw_only=True)
class InputCheck:
    """Validates the lines of one batch in their order, and collects the errors."""

    db: Database
    project_id: str
    endpoint: str
    max_line_bytes: int
    num_lines: int = 0
    errors: list[Json] = field(default_factory=list[Json])
    _lines_by_id: dict[str, int] = field(default_factory=dict[str, int])
    _models: dict[str, LorryError | None] = field(default_factory=dict[str, "LorryError | None"])
    """Why a model can't answer, by its name; None if it can."""

    @property
    def is_over(self) -> bool:
        """Whether the rest of the file need not be read."""
        return len(self.errors) >= MAX_ERRORS or self.num_lines > MAX_LINES

    def add(self, number: int, line: bytes) -> None:
        """Validate a line. Raises Unavailable."""
        self.num_lines += 1
        try:
            if self.num_lines > MAX_LINES:
                raise InvalidRequest("too_many_lines", max_lines=MAX_LINES)
            self._check(number, line)
        except LorryError as error:
            if error.status >= 500:
                raise
            self._note(error, number)

    def end(self) -> None:
        """Conclude the validation after the last line."""
        if not self.num_lines:
            self._note(
                InvalidRequest("batch_file_empty"),
                None,
            )

    def _check(self, number: int, line: bytes) -> None:
        entry = parse(line, endpoint=self.endpoint, max_line_bytes=self.max_line_bytes)
        earlier = self._lines_by_id.setdefault(entry.custom_id, number)
        if earlier != number:
            raise InvalidRequest(
                "duplicate_custom_id", custom_id=entry.custom_id[:80], earlier=earlier, param="custom_id"
            )
        if (error := self._why_not(entry.model)) is not None:
            raise error

    def _why_not(self, name: str) -> LorryError | None:
        if name not in self._models:
            try:
                requests.resolve(self.db, project_id=self.project_id, name=name)
                self._models[name] = None
            except LorryError as error:
                if error.status >= 500:
                    raise
                self._models[name] = error
        return self._models[name]

    def _note(self, error: LorryError, number: int | None) -> None:
        param = "body.model" if error.param == "model" else error.param
        self.errors.append({"code": error.code, "message": error.sentence(), "param": param, "line": number})
