"""A chat file to tokens: one safetensors file that a trainer reads, and a report that a person reads.

Runs as a child, `python -m worker.prepare ARGUMENTS.json`, without torch. A file that can't be trained on is no
failure: the report then holds a `refusal`. The same file, base and length give the same bytes.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from catalog.chat_rows import BadRow, parse_row
from catalog.datasets import read_rows
from catalog.disk import full_disk_named
from catalog.errors import InvalidRequest, OutOfSpace
from worker.chat_template import TEMPLATE_DATE, ChatTemplate, Refused, Rendered
from worker.token_file import TokenFile

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
    """What a file holds, as the base's tokenizer counts it."""

    format: int
    max_length: int
    rows: int
    usable_rows: int
    """Rows that are trained on: all but the empty ones."""
    tokens: int
    """Of the usable rows, as cut to max_length."""
    supervised_tokens: int
    truncated_rows: int
    empty_rows: int
    """Rows with nothing to learn, because it has weight 0 or was cut off."""
    duplicate_rows: int
    """Rows that an earlier one equals. They are kept."""
    longest_row: int
    """Tokens, before any cut."""
    median_row: int
    tokenizer: NotRequired[str]
    """sha256 of tokenizer.json."""
    chat_template: NotRequired[str]
    """sha256 of the template's text."""
    answers_by: NotRequired[str]
    """How the answers were found: by the template's `generation blocks`, or by `prefixes`."""
    template_date: NotRequired[str]
    refusal: NotRequired[Refusal]


@dataclass(kw_only=True, slots=True)
class _Counts:
    """What is counted row by row."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    seen: set[bytes] = field(default_factory=set[bytes])
    truncated: int = 0
    empty: int = 0
    duplicates: int = 0


def prepare(*, source: Path, base_dir: Path, max_length: int, out: Path) -> DatasetReport:
    """Tokenise the checked chat file `source` into `out`, which is not written where the report has a refusal.

    Each row is cut to its first `max_length` tokens. Raises OutOfSpace.
    """
    counts = _Counts()
    with full_disk_named(), TokenFile(out) as tokens:
        try:
            base = _Base.load(base_dir)
        except Refused as error:
            return _report(tokens, counts, max_length, refused=error)
        try:
            _fill(tokens, counts, source, base, max_length)
        except Refused as error:
            return _report(tokens, counts, max_length, base=base, refused=error)
        tokens.finish()
    return _report(tokens, counts, max_length, base=base)


class _Base:
    """What prepare needs to know of a base model."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, digest: str, num_ids: int | None) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.digest = digest
        self.num_ids = num_ids
        added = cast(dict[int, Any], tokenizer.get_added_tokens_decoder())
        self.special = np.array(sorted(ident for ident, token in added.items() if token.special), dtype=np.int64)

    @classmethod
    def load(cls, base_dir: Path) -> _Base:
        """Raises Refused."""
        template = ChatTemplate.load(base_dir)
        content = (base_dir / "tokenizer.json").read_bytes()
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = cast(dict[str, Any], json.loads((base_dir / "config.json").read_text("utf-8")))
        num_ids = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        return cls(template, tokenizer, sha256(content).hexdigest(), num_ids)

    def encode(self, texts: list[str]) -> list[Encoding]:
        return self.tokenizer.encode_batch(texts, add_special_tokens=False)


def _fill(tokens: TokenFile, counts: _Counts, source: Path, base: _Base, max_length: int) -> None:
    for batch in _batches(_rendered(source, base.template)):
        for rendered, encoding in zip(batch, base.encode([row.text for row in batch]), strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            _check_ids(ids, base)
            mask = _mask(ids, encoding, rendered, base.special, trims=not base.template.marks_spans)
            counts.lengths.append(len(ids))
            counts.duplicates += _is_seen(counts.seen, rendered.text)
            counts.truncated += len(ids) > max_length
            if mask[:max_length].any():
                tokens.add_row(ids[:max_length].astype(np.int32), mask[:max_length])
            else:
                counts.empty += 1
    if tokens.num_rows == 0:
        raise _nothing_to_learn(counts, max_length)


def _rendered(source: Path, template: ChatTemplate) -> Iterator[Rendered]:
    with source.open("rb") as lines:
        try:
            for number, line in read_rows(lines, max_line_bytes=MAX_LINE_BYTES):
                yield _render(template, number, line)
        except InvalidRequest as error:
            raise Refused(error.code, error.message, error.remedy) from error


def _render(template: ChatTemplate, number: int, line: bytes) -> Rendered:
    try:
        return template.render_supervised(parse_row(line))
    except BadRow as problem:
        raise Refused(problem.code, f"Line {number}: {problem.reason}.", problem.remedy) from problem
    except Refused as error:
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


def _mask(
    ids: NDArray[np.int64], encoding: Encoding, rendered: Rendered, special: NDArray[np.int64], *, trims: bool
) -> NDArray[np.uint8]:
    """1 for each token that overlaps an answer, but never for a row's first: nothing predicts it.

    trims: end an answer at its end-of-turn token, leaving the white space that a template puts after it.
    """
    mask = np.zeros(len(ids), dtype=np.uint8)
    if not len(ids):
        return mask
    starts, ends = np.array(encoding.offsets, dtype=np.int64).T
    is_special = np.isin(ids, special)
    for start, stop in rendered.spans:
        inside = np.flatnonzero((starts < stop) & (ends > start))
        marks = inside[is_special[inside]]
        if trims and len(marks) and not rendered.text[ends[marks[-1]] : stop].strip():
            inside = inside[inside <= marks[-1]]
        mask[inside] = 1
    mask[0] = 0
    return mask


def _is_seen(seen: set[bytes], text: str) -> bool:
    digest = blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
        return True
    seen.add(digest)
    return False


def _check_ids(ids: NDArray[np.int64], base: _Base) -> None:
    if base.num_ids is not None and len(ids) and int(ids.max()) >= base.num_ids:
        raise Refused(
            "tokenizer_exceeds_base",
            f"The base's tokenizer gave the token {int(ids.max())}, and the base knows {base.num_ids} of them.",
            "Add the base again with the tokenizer that it was trained with.",
        )


def _nothing_to_learn(counts: _Counts, max_length: int) -> Refused:
    num_rows = len(counts.lengths)
    return Refused(
        "nothing_to_learn",
        f"None of the {num_rows} rows has anything to learn in its first {max_length} tokens: every answer has "
        "weight 0, or begins after that.",
        f"Give answers a weight other than 0, shorten what stands before them, or raise max_length (the longest row "
        f"has {max(counts.lengths, default=0)} tokens).",
    )


def _report(
    tokens: TokenFile, counts: _Counts, max_length: int, *, base: _Base | None = None, refused: Refused | None = None
) -> DatasetReport:
    lengths = sorted(counts.lengths)
    report = DatasetReport(
        format=FORMAT,
        max_length=max_length,
        rows=len(lengths),
        usable_rows=tokens.num_rows,
        tokens=tokens.num_tokens,
        supervised_tokens=tokens.num_supervised,
        truncated_rows=counts.truncated,
        empty_rows=counts.empty,
        duplicate_rows=counts.duplicates,
        longest_row=lengths[-1] if lengths else 0,
        median_row=lengths[(len(lengths) - 1) // 2] if lengths else 0,
    )
    if base is not None:
        report["tokenizer"], report["chat_template"] = base.digest, base.template.digest
        report["answers_by"] = "generation blocks" if base.template.marks_spans else "prefixes"
        if base.template.asks_for_date:
            report["template_date"] = f"{TEMPLATE_DATE:%Y-%m-%d}"
    if refused is not None:
        report["refusal"] = Refusal(code=refused.code, message=refused.message, remedy=refused.remedy)
    return report


def main(arguments_path: Path) -> int:
    """Read {source, base_dir, max_length, out, report}, write the report. Returns the exit status."""
    arguments = json.loads(arguments_path.read_text("utf-8"))
    try:
        report = prepare(
            source=Path(arguments["source"]),
            base_dir=Path(arguments["base_dir"]),
            max_length=int(arguments["max_length"]),
            out=Path(arguments["out"]),
        )
        with full_disk_named():
            _write_json(Path(arguments["report"]), report)
    except OutOfSpace as error:
        sys.stderr.write(error.sentence() + "\n")
        return EXIT_DISK_FULL
    return 0


def _write_json(path: Path, report: DatasetReport) -> None:
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
