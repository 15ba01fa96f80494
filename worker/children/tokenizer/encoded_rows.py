"""A row as the tokenizer has it, and what is counted of a file row by row, or pair by pair."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from catalog.datasets.formats import RowKind
from worker.children.tokenizer.chat_template import Rendered

Flaw = Literal["too_long", "empty", "duplicate"]
"""What a person will want to know of a row: more tokens than are kept, nothing learnt in it or a piece of it, equal to
an earlier one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """ids int64 [T]; mask uint8 [T], 1 where the token is learnt. Before any cut."""

    rendered: Rendered
    ids: NDArray[np.int64]
    mask: NDArray[np.uint8]

    @property
    def text(self) -> str:
        return self.rendered.text

    @property
    def label(self) -> float | None:
        """As a trainer reads it; None where the row has none."""
        return None if self.rendered.is_desirable is None else float(self.rendered.is_desirable)


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

    def count(self, rows: Sequence[EncodedRow], *, max_length: int) -> set[Flaw]:
        """One row, or the two of a pair. Returns what is the matter with it."""
        length = max(len(row.ids) for row in rows)
        self.lengths.append(length)
        is_too_long = length > max_length
        self.too_long += is_too_long
        said = [row.text if row.label is None else f"{row.text}\0{row.label}" for row in rows]
        digest = blake2b("\0".join(said).encode(), digest_size=16).digest()
        is_duplicate = digest in self.seen
        self.duplicates += is_duplicate
        self.seen.add(digest)
        flaws: dict[Flaw, bool] = {"too_long": is_too_long, "duplicate": is_duplicate}
        return {flaw for flaw, is_there in flaws.items() if is_there}

    def keep(self, num_tokens: int, *, label: float | None = None) -> None:
        """A row or pair of so many tokens is trained on."""
        self.longest_example = max(self.longest_example, num_tokens)
        self.desirable += int(label or 0)
