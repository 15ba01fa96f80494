"""Tokenizes a data file: writes a safetensors file for trainers, and a report for users.

Runs as a child process, `python -m worker.children.tokenizer.main ARGUMENTS.json`, without torch. If the file can't be
trained on, the report contains a `refusal`, and the exit status is 0. The same file, base model and length result in
the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NotRequired, TypedDict

import numpy as np

from catalog.datasets.formats import PREFERENCE, UNPAIRED, DataKind, kind_of_row
from catalog.datasets.row_json import BadRow, parse_object
from catalog.datasets.rows import check_pair, check_unpaired
from catalog.datasets.validator import read_rows
from catalog.disk import full_disk_named
from catalog.errors import InvalidRequest, OutOfSpace
from catalog.spec.data import DataOptions, Loss, Overflow
from worker.children.tokenizer.chat_template import TEMPLATE_DATE, Refused, Rendered
from worker.children.tokenizer.preview import (
    PreviewDetails,
    ShownRows,
    are_equal,
    nothing_to_compare,
    refuse_one_label,
    render_labeled,
    render_pair,
)
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.tokenizer.token_file import Counts, EncodedRow, TokenFile, fit_tokens
from worker.protocol.errors import EXIT_DISK_FULL

FORMAT = 1
BATCH_ROWS = 512
BATCH_CHARS = 2**21
MAX_LINE_BYTES = 2**30
"""Not a limit in practice: uploads have a lower limit."""


class Refusal(TypedDict):
    """Why the file can't be trained on with this base."""

    code: str
    message: str
    remedy: str


class DatasetReport(TypedDict):
    """The content of a file, as counted with the base model's tokenizer.

    In a preference file, a row is a pair. A property of the pair holds if it holds for one of its answers.
    """

    format: int
    max_length: int
    rows: int
    usable_rows: int
    """Rows that are trained on: all except empty and dropped ones. Each piece of a split row counts."""
    tokens: int
    """Tokens of the usable rows, after truncation to max_length."""
    supervised_tokens: int
    truncated_rows: int
    """Rows of more than max_length tokens that are truncated."""
    dropped_rows: int
    """Rows of more than max_length tokens that are dropped."""
    split_rows: int
    """Rows of more than max_length tokens that are split into pieces. Each piece counts as a usable row."""
    empty_rows: int
    """Rows, or pieces of rows, without trainable tokens, because they have weight 0 or were truncated. A pair is empty
    if one of its answers is, or if both are equal after truncation."""
    loss: Loss
    overflow: Overflow
    duplicate_rows: int
    """Rows that are equal to an earlier one. They are kept."""
    longest_row: int
    """Tokens of the longest row before truncation. For a pair, of the prompt with the longer answer."""
    longest_example: int
    """Tokens of the longest usable row after truncation to max_length. For a pair, of both rows together."""
    median_row: int
    tokenizer: str
    """sha256 of tokenizer.json."""
    kind: NotRequired[DataKind]
    """The kind of the rows."""
    desirable_rows: NotRequired[int]
    """Usable rows with the label true, if rows have labels."""
    chat_template: NotRequired[str]
    """sha256 of the template's text, if it has rendered rows. If that for tools has too, of the default one."""
    opens_with: NotRequired[str | None]
    """The text that the tokenizer adds before each plain text."""
    ends_with: NotRequired[str | None]
    """The token that ends each plain text, and is trained on with it."""
    answers_by: NotRequired[str]
    """How the answers were found: by the template's `generation blocks`, or by `prefixes`."""
    template_date: NotRequired[str]
    refusal: NotRequired[Refusal]


def prepare(
    *,
    source: Path,
    base_dir: Path,
    max_length: int,
    out: Path,
    data: DataOptions | None = None,
    shown: ShownRows | None = None,
) -> DatasetReport:
    """Tokenize the checked file `source` into `out`, which is not written if the report has a refusal.

    No row keeps more than `max_length` tokens. data: defines the trained tokens, and the handling of longer rows.
    shown: collects rows for the preview. Raises OutOfSpace.
    """
    counts, data, shown = Counts(), data or DataOptions(), shown or ShownRows()
    base = BaseText(base_dir)
    with full_disk_named(), TokenFile(out) as tokens:
        try:
            _fill(tokens, counts, base, shown, source=source, max_length=max_length, data=data)
        except Refused as error:
            return _report(tokens, counts, base, max_length=max_length, data=data, refused=error)
        except MemoryError:
            refused = _beyond_limit("memory")
            return _report(tokens, counts, base, max_length=max_length, data=data, refused=refused)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            refused = _beyond_limit("disk")
            return _report(tokens, counts, base, max_length=max_length, data=data, refused=refused)
        tokens.finish()
    return _report(tokens, counts, base, max_length=max_length, data=data)


def _beyond_limit(what: str) -> Refused:
    """Return the error for an exceeded limit. The limits of the worker are many times the needs of a usual file of this
    size: see sandbox.tokenization."""
    return Refused("preparation_limit", resource=what)


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGXCPU, which the kernel sends again every second until it kills the process."""
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    raise _beyond_limit("processor time")


def _fill(
    tokens: TokenFile,
    counts: Counts,
    base: BaseText,
    shown: ShownRows,
    *,
    source: Path,
    max_length: int,
    data: DataOptions,
) -> None:
    for example in _examples(source, base, counts, data):
        flaws = counts.count(example, max_length=max_length)
        fitting = [fit_tokens((row.ids, row.mask), max_length=max_length, overflow=data.overflow) for row in example]
        for rows in zip(*fitting, strict=False):  # the pieces of a row, one by one; a pair is never split
            if all(mask.any() for _, mask in rows) and not are_equal(rows):
                for ids, mask in rows:
                    tokens.add_row(ids.astype(np.int32), mask, example[0].label)
                counts.keep(sum(len(ids) for ids, _ in rows), label=example[0].label)
            else:
                counts.empty += 1
                flaws.add("empty")
        shown.see(base, example, fitting, flaws)
    if tokens.num_rows == 0:
        raise _no_trainable_tokens(counts, max_length, data)
    if counts.kind is UNPAIRED:
        refuse_one_label(tokens.num_rows, counts.desirable)


def _examples(source: Path, base: BaseText, counts: Counts, data: DataOptions) -> Iterator[tuple[EncodedRow, ...]]:
    """Yield each example: one row, or the two rows of a pair."""
    rows = _encoded(source, base, counts, data)
    for row in rows:
        yield (row, next(rows)) if counts.kind is PREFERENCE else (row,)


def _encoded(source: Path, base: BaseText, counts: Counts, data: DataOptions) -> Iterator[EncodedRow]:
    for batch in _batches(_rendered(source, base, counts, data)):
        for rendered, (ids, mask) in zip(batch, base.encode(batch), strict=True):
            yield EncodedRow(rendered=rendered, ids=ids, mask=mask)


def _rendered(source: Path, base: BaseText, counts: Counts, data: DataOptions) -> Iterator[Rendered]:
    with source.open("rb") as lines:
        try:
            for number, line in read_rows(lines, max_line_bytes=MAX_LINE_BYTES):
                yield from (replace(row, line=number) for row in _render(base, counts, data, number, line))
        except InvalidRequest as error:
            raise Refused(error.text) from error


def _render(base: BaseText, counts: Counts, data: DataOptions, number: int, line: bytes) -> tuple[Rendered, ...]:
    try:
        row = parse_object(line)
        counts.kind = kind = kind_of_row(row, before=counts.kind)
        if kind is PREFERENCE:
            return render_pair(base, check_pair(row))
        if kind is UNPAIRED:
            return (render_labeled(base, check_unpaired(row)),)
        return (base.render(kind.name, kind.check(row), loss=data.loss),)
    except BadRow as problem:
        raise Refused(replace(problem.text, message=f"Line {number}: {problem.text.message}")) from problem
    except Refused as error:
        if error.code == "base_has_no_chat_template":
            raise  # the row is not at fault
        raise Refused(replace(error.text, message=f"Line {number}: {error.message}")) from error


def _batches(rows: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    """Yield batches of rows for the tokenizer, limited by the number of rows and characters."""
    batch: list[Rendered] = []
    num_chars = 0
    for row in rows:
        batch.append(row)
        num_chars += len(row.text)
        if len(batch) >= BATCH_ROWS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _no_trainable_tokens(counts: Counts, max_length: int, data: DataOptions) -> Refused:
    num_rows, longest = len(counts.lengths), max(counts.lengths, default=0)
    if data.overflow == "drop" and counts.too_long:
        return Refused(
            "no_rows_left", num_rows=num_rows, too_long=counts.too_long, max_length=max_length, longest=longest
        )
    if counts.kind is not None and counts.kind.name == "text":
        return Refused("no_trainable_tokens_in_texts", num_rows=num_rows, longest=longest)
    if counts.kind is PREFERENCE:
        return nothing_to_compare(num_rows, longest, max_length)
    return Refused("no_trainable_tokens_in_rows", num_rows=num_rows, max_length=max_length, longest=longest)


def _report(
    tokens: TokenFile,
    counts: Counts,
    base: BaseText,
    *,
    max_length: int,
    data: DataOptions,
    refused: Refused | None = None,
) -> DatasetReport:
    lengths = sorted(counts.lengths)
    report = DatasetReport(
        format=FORMAT,
        max_length=max_length,
        rows=len(lengths),
        usable_rows=tokens.num_rows // (2 if counts.kind is PREFERENCE else 1),
        tokens=tokens.num_tokens,
        supervised_tokens=tokens.num_supervised,
        truncated_rows=counts.too_long if data.overflow == "truncate" else 0,
        dropped_rows=counts.too_long if data.overflow == "drop" else 0,
        split_rows=counts.too_long if data.overflow == "split" else 0,
        empty_rows=counts.empty,
        duplicate_rows=counts.duplicates,
        longest_row=lengths[-1] if lengths else 0,
        longest_example=counts.longest_example,
        median_row=lengths[(len(lengths) - 1) // 2] if lengths else 0,
        tokenizer=base.digest,
        loss=data.loss,
        overflow=data.overflow,
    )
    if counts.kind is not None:
        report["kind"] = counts.kind.name
    if counts.kind is UNPAIRED:
        report["desirable_rows"] = counts.desirable
    if templates := base.used_templates:
        report["chat_template"] = templates[0].digest
        methods = {"generation blocks" if template.marks_spans else "prefixes" for template in templates}
        report["answers_by"] = " and ".join(sorted(methods))
        if any(template.asks_for_date for template in templates):
            report["template_date"] = f"{TEMPLATE_DATE:%Y-%m-%d}"
    elif report.get("kind", "chat") != "chat":
        report["opens_with"], report["ends_with"] = base.opens_with, base.eos[1] if base.eos else None
    if refused is not None:
        report["refusal"] = Refusal(code=refused.code, message=refused.message, remedy=refused.remedy)
    return report


def main(arguments_path: Path) -> int:
    """Read {source, base_dir, max_length, data, out, details, result} from a file, and write the last three files.
    Returns the exit status."""
    signal.signal(signal.SIGXCPU, _out_of_time)
    arguments = json.loads(arguments_path.read_text("utf-8"))
    shown = ShownRows()
    try:
        report = prepare(
            source=Path(arguments["source"]),
            base_dir=Path(arguments["base_dir"]),
            max_length=int(arguments["max_length"]),
            out=Path(arguments["out"]),
            data=DataOptions.model_validate(arguments["data"]),
            shown=shown,
        )
        with full_disk_named():
            _write_json(Path(arguments["details"]), shown.details())
            _write_json(Path(arguments["result"]), report)
    except OutOfSpace as error:
        sys.stderr.write(error.sentence() + "\n")
        return EXIT_DISK_FULL
    return 0


def _write_json(path: Path, report: DatasetReport | PreviewDetails) -> None:
    """Write a file atomically, because its reader may check for it at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", "utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
