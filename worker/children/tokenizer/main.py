"""A data file to tokens: one safetensors file that a trainer reads, and a report that a person reads.

Runs as a child, `python -m worker.children.tokenizer.main ARGUMENTS.json`, without torch. A file that can't be trained
on is no failure: the report then holds a `refusal`. The same file, base and length give the same bytes.
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

from catalog.datasets.chat import BadRow, parse_object
from catalog.datasets.formats import PREFERENCE, UNPAIRED, DataKind, kind_of_row
from catalog.datasets.rows import check_pair, check_unpaired
from catalog.datasets.validator import read_rows
from catalog.disk import full_disk_named
from catalog.errors import InvalidRequest, OutOfSpace
from catalog.spec.data import DataSpec, Loss, Overflow
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

FORMAT = 1
BATCH_ROWS = 512
BATCH_CHARS = 2**21
MAX_LINE_BYTES = 2**30
"""The upload was held to less."""
EXIT_DISK_FULL = 75
"""EX_TEMPFAIL: the file is not to blame, try again."""


class Refusal(TypedDict):
    """Why the file can't be trained on with this base."""

    code: str
    message: str
    remedy: str


class DatasetReport(TypedDict):
    """What a file holds, as the base's tokenizer counts it.

    In a file of pairs a row is a pair: what is said of it holds where it does of one of the answers.
    """

    format: int
    max_length: int
    rows: int
    usable_rows: int
    """Rows that are trained on: all but the empty and the dropped ones, with each piece of a split one."""
    tokens: int
    """Of the usable rows, as cut to max_length."""
    supervised_tokens: int
    truncated_rows: int
    """Rows of more than max_length tokens, of which the start is kept."""
    dropped_rows: int
    """Rows of more than max_length tokens that are left out."""
    split_rows: int
    """Rows of more than max_length tokens that are cut into pieces; each counts as a usable row of its own."""
    empty_rows: int
    """Rows, or pieces of one, with nothing to learn, because it has weight 0 or was cut off. Of a pair one such answer
    is enough, or that both are the same once cut."""
    loss: Loss
    overflow: Overflow
    duplicate_rows: int
    """Rows that an earlier one equals. They are kept."""
    longest_row: int
    """Tokens, before any cut. Of a pair, the prompt with the longer answer."""
    longest_example: int
    """Tokens of the longest usable row, as cut to max_length; of a pair, both its rows together."""
    median_row: int
    tokenizer: str
    """sha256 of tokenizer.json."""
    kind: NotRequired[DataKind]
    """What the rows are."""
    desirable_rows: NotRequired[int]
    """Usable rows with the label true, where rows have labels."""
    chat_template: NotRequired[str]
    """sha256 of the template's text, where rows went through it."""
    opens_with: NotRequired[str | None]
    """What the tokenizer puts before each plain text."""
    ends_with: NotRequired[str | None]
    """The token that ends each plain text, and is learnt with it."""
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
    data: DataSpec | None = None,
    shown: ShownRows | None = None,
) -> DatasetReport:
    """Tokenize the checked file `source` into `out`, which is not written where the report has a refusal.

    No row keeps more than `max_length` tokens. data: what is learnt, and what becomes of longer rows. shown: is told
    of each row. Raises OutOfSpace.
    """
    counts, data, shown = Counts(), data or DataSpec(), shown or ShownRows()
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
    """The worker limits a preparation to many times what a usual file of its size takes: see sandbox.tokenization."""
    return Refused(
        "preparation_limit",
        f"The file takes more {what} to tokenize than the worker allows for its size.",
        "Look at the base's chat template, which may repeat text or loop without end; or split the file.",
    )


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    """The handler of SIGXCPU, which is sent again every second until the process is killed."""
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
    data: DataSpec,
) -> None:
    for example in _examples(source, base, counts, data):
        flaws = counts.count(example, max_length=max_length)
        fitting = [fit_tokens((row.ids, row.mask), max_length=max_length, overflow=data.overflow) for row in example]
        for rows in zip(*fitting, strict=False):  # the pieces of a row, one by one; a pair whole, or not at all
            if all(learnt.any() for _, learnt in rows) and not are_equal(rows):
                for ids, learnt in rows:
                    tokens.add_row(ids.astype(np.int32), learnt, example[0].label)
                counts.keep(sum(len(ids) for ids, _ in rows), label=example[0].label)
            else:
                counts.empty += 1
                flaws.add("empty")
        shown.see(base, example, fitting, flaws)
    if tokens.num_rows == 0:
        raise _nothing_to_learn(counts, max_length, data)
    if counts.kind is UNPAIRED:
        refuse_one_label(tokens.num_rows, counts.desirable)


def _examples(source: Path, base: BaseText, counts: Counts, data: DataSpec) -> Iterator[tuple[EncodedRow, ...]]:
    """One row each, or the two of a pair."""
    rows = _encoded(source, base, counts, data)
    for row in rows:
        yield (row, next(rows)) if counts.kind is PREFERENCE else (row,)


def _encoded(source: Path, base: BaseText, counts: Counts, data: DataSpec) -> Iterator[EncodedRow]:
    for batch in _batches(_rendered(source, base, counts, data)):
        for rendered, (ids, mask) in zip(batch, base.encode(batch), strict=True):
            yield EncodedRow(rendered=rendered, ids=ids, mask=mask)


def _rendered(source: Path, base: BaseText, counts: Counts, data: DataSpec) -> Iterator[Rendered]:
    with source.open("rb") as lines:
        try:
            for number, line in read_rows(lines, max_line_bytes=MAX_LINE_BYTES):
                yield from (replace(row, line=number) for row in _render(base, counts, data, number, line))
        except InvalidRequest as error:
            raise Refused(error.code, error.message, error.remedy) from error


def _render(base: BaseText, counts: Counts, data: DataSpec, number: int, line: bytes) -> tuple[Rendered, ...]:
    try:
        row = parse_object(line)
        counts.kind = kind = kind_of_row(row, before=counts.kind)
        if kind is PREFERENCE:
            return render_pair(base.template, check_pair(row))
        if kind is UNPAIRED:
            return (render_labeled(base, check_unpaired(row)),)
        return (base.render(kind.name, kind.check(row), loss=data.loss),)
    except BadRow as problem:
        raise Refused(problem.code, f"Line {number}: {problem.reason}.", problem.remedy) from problem
    except Refused as error:
        if error.code == "base_has_no_chat_template":
            raise  # no row is to blame
        raise Refused(error.code, f"Line {number}: {error.message}", error.remedy) from error


def _batches(rows: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    """Rows for one call of the tokenizer, bounded in number and in text."""
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


def _nothing_to_learn(counts: Counts, max_length: int, data: DataSpec) -> Refused:
    num_rows, longest = len(counts.lengths), max(counts.lengths, default=0)
    if data.overflow == "drop" and counts.too_long:
        return Refused(
            "nothing_to_learn",
            f"Of {num_rows} rows {counts.too_long} have more than {max_length} tokens and are left out, and the others "
            "have nothing to learn.",
            f"Raise max_length (the longest row has {longest} tokens), say 'truncate', or give shorter rows.",
        )
    if counts.kind is not None and counts.kind.name == "text":
        return Refused(
            "nothing_to_learn",
            f"None of the {num_rows} texts has a token that another one stands before.",
            f"Give longer texts: the longest has {longest} tokens.",
        )
    if counts.kind is PREFERENCE:
        return nothing_to_compare(num_rows, longest, max_length)
    return Refused(
        "nothing_to_learn",
        f"None of the {num_rows} rows has anything to learn in its first {max_length} tokens: every answer has "
        "weight 0, or begins after that.",
        f"Give answers a weight other than 0, shorten what stands before them, or raise max_length (the longest row "
        f"has {longest} tokens).",
    )


def _report(
    tokens: TokenFile,
    counts: Counts,
    base: BaseText,
    *,
    max_length: int,
    data: DataSpec,
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
    if (template := base.used_template) is not None:
        report["chat_template"] = template.digest
        report["answers_by"] = "generation blocks" if template.marks_spans else "prefixes"
        if template.asks_for_date:
            report["template_date"] = f"{TEMPLATE_DATE:%Y-%m-%d}"
    elif report.get("kind", "chat") != "chat":
        report["opens_with"], report["ends_with"] = base.opens_with, base.eos[1] if base.eos else None
    if refused is not None:
        report["refusal"] = Refusal(code=refused.code, message=refused.message, remedy=refused.remedy)
    return report


def main(arguments_path: Path) -> int:
    """Read {source, base_dir, max_length, data, out, report, details}, write the last two. Returns the exit status."""
    signal.signal(signal.SIGXCPU, _out_of_time)
    arguments = json.loads(arguments_path.read_text("utf-8"))
    shown = ShownRows()
    try:
        report = prepare(
            source=Path(arguments["source"]),
            base_dir=Path(arguments["base_dir"]),
            max_length=int(arguments["max_length"]),
            out=Path(arguments["out"]),
            data=DataSpec.model_validate(arguments["data"]),
            shown=shown,
        )
        with full_disk_named():
            _write_json(Path(arguments["details"]), shown.details())
            _write_json(Path(arguments["report"]), report)
    except OutOfSpace as error:
        sys.stderr.write(error.sentence() + "\n")
        return EXIT_DISK_FULL
    return 0


def _write_json(path: Path, report: DatasetReport | PreviewDetails) -> None:
    """Whole or not at all: whoever waits for it may look at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", "utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
