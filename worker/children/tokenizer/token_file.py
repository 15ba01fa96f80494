"""Writes the safetensors file of tokenized rows, row by row. Only the row offsets and labels are kept in memory.

The file contains input_ids int32 [N], loss_mask uint8 [N], row_offsets int64 [rows + 1], and for rows with labels also
labels fp32 [rows]. lora_core.data.token_dataset reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from catalog.datasets.formats import RowKind
from catalog.spec.data import Overflow
from worker.children.tokenizer.chat_template import Rendered

COPY_BYTES = 2**20


class TokenFile:
    """A context manager that writes the file. `finish` creates it atomically. Without `finish`, no file is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q", [0])
        self._labels = array("f")
        self.num_supervised = 0

    def __enter__(self) -> TokenFile:
        self._ids: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)
        self._mask: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids.close()
        self._mask.close()

    @property
    def num_rows(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def add_row(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], label: float | None = None) -> None:
        """Add a row: ids int32 [T], mask uint8 [T]. Either all rows have a label, or none has."""
        if label is not None:
            self._labels.append(label)
        self._ids.write(_little_endian(ids).tobytes())
        self._mask.write(mask.tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self.num_supervised += int(mask.sum())

    def finish(self) -> None:
        """Write header and tensors to a temporary file, then rename it."""
        assert len(self._labels) in (0, self.num_rows)
        offsets = _little_endian(np.array(self._offsets, dtype=np.int64)).tobytes()
        labels = _little_endian(np.array(self._labels, dtype=np.float32)).tobytes()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as out:
                out.write(_header(self.num_rows, self.num_tokens, has_labels=bool(labels)))
                out.write(offsets)
                out.write(labels)
                for part in (self._ids, self._mask):
                    part.seek(0)
                    shutil.copyfileobj(part, out, COPY_BYTES)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _header(num_rows: int, num_tokens: int, *, has_labels: bool) -> bytes:
    """Return the header as the safetensors library writes it: widest type first, padded to 8 bytes."""
    tensors: list[tuple[str, str, int, int]] = [
        ("row_offsets", "I64", num_rows + 1, 8),
        *([("labels", "F32", num_rows, 4)] if has_labels else []),
        ("input_ids", "I32", num_tokens, 4),
        ("loss_mask", "U8", num_tokens, 1),
    ]
    entries: dict[str, dict[str, str | Sequence[int]]] = {}
    start = 0
    for name, dtype, length, width in tensors:
        stop = start + length * width
        entries[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _little_endian(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.byteswap() if sys.byteorder == "big" else values


Flaw = Literal["too_long", "empty", "duplicate"]
"""A problem of a row for the preview: it has more tokens than max_length, it or a piece of it has no trainable tokens,
or it is equal to an earlier row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """A row before truncation: ids int64 [T]; mask uint8 [T], 1 for trained tokens."""

    rendered: Rendered
    ids: NDArray[np.int64]
    mask: NDArray[np.uint8]

    @property
    def text(self) -> str:
        return self.rendered.text

    @property
    def label(self) -> float | None:
        """The label for the trainer: 1.0 or 0.0. None if the row has no label."""
        return None if self.rendered.is_desirable is None else float(self.rendered.is_desirable)


@dataclass(kw_only=True, slots=True)
class Counts:
    """Counts over all rows. A property of a pair holds if it holds for one of its answers."""

    kind: RowKind | None = None
    """The kind of all rows. None until the first row is read."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    seen: set[bytes] = field(default_factory=set[bytes])
    too_long: int = 0
    empty: int = 0
    duplicates: int = 0
    desirable: int = 0
    longest_example: int = 0
    """Tokens of the longest row, or pair of rows, that is kept, after truncation."""

    def count(self, rows: Sequence[EncodedRow], *, max_length: int) -> set[Flaw]:
        """Count one row, or the two rows of a pair. Returns its flaws."""
        length = max(len(row.ids) for row in rows)
        self.lengths.append(length)
        is_too_long = length > max_length
        self.too_long += is_too_long
        texts = [row.text if row.label is None else f"{row.text}\0{row.label}" for row in rows]
        digest = blake2b("\0".join(texts).encode(), digest_size=16).digest()
        is_duplicate = digest in self.seen
        self.duplicates += is_duplicate
        self.seen.add(digest)
        flaws: dict[Flaw, bool] = {"too_long": is_too_long, "duplicate": is_duplicate}
        return {flaw for flaw, is_present in flaws.items() if is_present}

    def keep(self, num_tokens: int, *, label: float | None = None) -> None:
        """Count a row, or a pair, of `num_tokens` tokens that is trained on."""
        self.longest_example = max(self.longest_example, num_tokens)
        self.desirable += int(label or 0)


Tokens = tuple[NDArray[np.int64], NDArray[np.uint8]]
"""(ids, mask) of a row, both [T]. The mask is 1 for trained tokens."""


def fit_tokens(row: Tokens, *, max_length: int, overflow: Overflow) -> list[Tokens]:
    """Return the row as rows of at most `max_length` tokens.

    The pieces of a split row are independent. The first token of a piece is not trained on, because nothing in the
    piece predicts it. Therefore a long text loses one trained token for every max_length tokens.
    """
    ids, mask = row
    if len(ids) <= max_length:
        return [row]
    if overflow == "drop":
        return []
    if overflow == "truncate":
        return [(ids[:max_length], mask[:max_length])]
    starts = range(0, len(ids), max_length)
    return [_piece(ids[start : start + max_length], mask[start : start + max_length]) for start in starts]


def _piece(ids: NDArray[np.int64], mask: NDArray[np.uint8]) -> Tokens:
    piece_mask = mask.copy()
    piece_mask[0] = 0
    return ids, piece_mask
