"""A row as the tokenizer has it, and what is counted of a file row by row, or pair by pair."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from catalog.row_kinds import RowKind


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """ids int64 [T]; mask uint8 [T], 1 where the token is learnt. Before any cut."""

    text: str
    ids: NDArray[np.int64]
    mask: NDArray[np.uint8]
    is_desirable: bool | None = None

    @property
    def label(self) -> float | None:
        """As a trainer reads it; None where the row has none."""
        return None if self.is_desirable is None else float(self.is_desirable)


@dataclass(kw_only=True, slots=True)
class Counts:
    """What is counted row by row; of a pair, whatever holds for one of its answers."""

    kind: RowKind | None = None
    """Of all rows, once the first was read."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    seen: set[bytes] = field(default_factory=set[bytes])
    too_long: int = 0
    empty: int = 0
    duplicates: int = 0
    desirable: int = 0
    longest_example: int = 0
    """Tokens of the longest row that is kept, as cut, or of the longest pair of rows."""

    def count(self, rows: Sequence[EncodedRow], *, max_length: int) -> None:
        """One row, or the two of a pair."""
        length = max(len(row.ids) for row in rows)
        self.lengths.append(length)
        self.too_long += length > max_length
        said = [row.text if row.label is None else f"{row.text}\0{row.label}" for row in rows]
        digest = blake2b("\0".join(said).encode(), digest_size=16).digest()
        self.duplicates += digest in self.seen
        self.seen.add(digest)

    def keep(self, num_tokens: int, *, label: float | None = None) -> None:
        """A row or pair of so many tokens is trained on."""
        self.longest_example = max(self.longest_example, num_tokens)
        self.desirable += int(label or 0)
