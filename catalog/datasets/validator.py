"""Validates the structure of a data set in JSON Lines, in one pass, line by line and without a tokenizer.

Every error has a code, the line number and a remedy. `formats` defines the valid lines. Memory use is bounded by
`max_line_bytes`, however long a line is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from catalog.datasets.formats import KINDS, DataKind, RowKind, kind_of_row
from catalog.datasets.row_json import BadRow, parse_object
from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest

MAX_LISTED = 5
"""Maximum number of bad lines in one error; reading stops at the last of them."""
SKIP_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors write it before UTF-8. It has no meaning there and is skipped."""

MAGICS = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"%PDF": "a PDF",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCheck:
    """Properties of a valid data set."""

    num_rows: int
    kind: DataKind = "chat"


def inspect(lines: IO[bytes], *, max_line_bytes: int, max_rows: int) -> DatasetCheck:
    """Validate a file from its current position to its end. Raises InvalidRequest with up to MAX_LISTED bad lines."""
    problems: list[tuple[int, BadRow]] = []
    num_rows = num_supervised = 0
    kind: RowKind | None = None
    first_line = 1
    for number, line in _read_lines(lines, max_line_bytes=max_line_bytes):
        num_rows += 1
        if num_rows > max_rows:
            raise _refuse([(number, _too_many(max_rows))])
        if num_rows == 1 and isinstance(line, bytes):
            _check_first(number, line)
        try:
            row = _parse_line(line)
            first_line = first_line if kind is not None else number
            kind = kind_of_row(row, before=kind, first_line=first_line)
            num_supervised += kind.is_supervised(kind.check(row))
        except BadRow as problem:
            problems.append((number, problem))
            if len(problems) == MAX_LISTED:
                break
    if problems:
        raise _refuse(problems)
    if num_rows == 0:
        raise InvalidRequest("file_without_rows", param="file")
    assert kind is not None
    if num_supervised == 0:
        raise InvalidRequest(
            "only_masked_completions" if kind.name == "completion" else "only_masked_rows", param="file"
        )
    return DatasetCheck(num_rows=num_rows, kind=kind.name)


def read_rows(lines: IO[bytes], *, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) for a file that `inspect` accepted. Raises InvalidRequest for an invalid line."""
    for number, line in _read_lines(lines, max_line_bytes=max_line_bytes):
        if isinstance(line, BadRow):
            raise _refuse([(number, line)])
        yield number, line


def _read_lines(lines: IO[bytes], *, max_line_bytes: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield the number, from 1, and the content of each line. Blank lines at the end are skipped."""
    number, blank = 0, 0
    while line := lines.readline(max_line_bytes + 2 + (0 if number else len(BYTE_ORDER_MARK))):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        content = line.rstrip(b"\r\n")
        if len(content) > max_line_bytes:
            num_bytes = _skip_rest(lines, line)
            yield number, _too_long(num_bytes, max_line_bytes)
        elif not content.strip():
            blank = blank or number
        else:
            if blank:
                yield blank, _blank(blank, number - 1)
                blank = 0
            yield number, content


def _skip_rest(lines: IO[bytes], line: bytes) -> int:
    """Skip the rest of a line that begins with `line`. Returns the number of bytes in the whole line, without its
    newline."""
    num_bytes = 0
    while not line.endswith(b"\n"):
        num_bytes += len(line)
        if not (line := lines.readline(SKIP_BYTES)):
            return num_bytes
    return num_bytes + len(line.rstrip(b"\r\n"))


def _parse_line(line: bytes | BadRow) -> dict[str, Any]:
    if isinstance(line, BadRow):
        raise line
    return parse_object(line)


def _check_first(number: int, line: bytes) -> None:
    """Detect a file in another format, to report one error instead of one for each line."""
    kind = next((name for magic, name in MAGICS.items() if line.startswith(magic)), None)
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _refuse([(number, BadRow("file_is_utf16"))])
    start = line.lstrip()[:1]
    if kind is None and start == b"[":
        kind = "a JSON array"
    elif kind is None and line.strip() == b"{":
        kind = "one JSON object over several lines"
    elif kind is None and start != b"{":
        kind = "CSV or plain text"
    if kind is not None:
        raise _refuse([(number, BadRow("not_jsonl", kind=kind, form=KINDS[0].form))])


def _refuse(problems: list[tuple[int, BadRow]]) -> InvalidRequest:
    """Build one error for all bad lines. A remedy that all lines share appears once, at the end."""
    code, remedies = problems[0][1].code, {problem.remedy for _, problem in problems}
    if len(remedies) == 1:
        sentences = [f"Line {number}: {problem.reason}." for number, problem in problems]
        remedy = remedies.pop()
    else:
        sentences = [f"Line {number}: {problem.reason}. {problem.remedy}" for number, problem in problems]
        remedy = "Correct these lines, then upload the file again."
    if len(problems) == MAX_LISTED:
        sentences.append(f"Reading stopped at the {MAX_LISTED}th bad line; there may be more.")
    return InvalidRequest(ErrorText(code=code, message=" ".join(sentences), remedy=remedy, param="file"))


def _blank(first: int, last: int) -> BadRow:
    """Return the error for the blank lines `first` to `last` between two rows."""
    if first == last:
        return BadRow("blank_line")
    return BadRow("blank_lines", first=first, last=last)


def _too_long(num_bytes: int, max_line_bytes: int) -> BadRow:
    return BadRow("line_too_long", num_bytes=num_bytes, max_line_bytes=max_line_bytes)


def _too_many(max_rows: int) -> BadRow:
    return BadRow("too_many_rows", max_rows=max_rows)
