"""What a person is shown of a data file beside its counts: sample rows token by token, and the lines of odd rows.

Unlike the counts this holds the data itself: it is shown only to those who may read the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, get_args

import numpy as np

from worker.children.tokenizer.encoded_rows import EncodedRow, Flaw
from worker.children.tokenizer.overflow import Tokens
from worker.children.tokenizer.text_encoder import BaseText

NUM_SAMPLES = 3
"""The first rows; beside them the first that is too long and the first with nothing to learn."""
MAX_LINES = 20
"""That are named of each flaw."""
MAX_SHOWN = 240
"""Tokens of one row that are shown."""
HEAD, BEFORE_LEARNT = 60, 30
"""Of a longer row: so many of its first tokens, and then from so many before the first that is learnt."""
MAX_PIECE_CHARS = 200


class ShownToken(TypedDict):
    text: str
    id: int
    learnt: bool


class Segment(TypedDict):
    """Tokens that follow each other. start: the place of the first in its row, from 0."""

    start: int
    tokens: list[ShownToken]


class ShownRow(TypedDict):
    part: str | None
    """Of a pair: chosen or rejected."""
    num_tokens: int
    """As trained: after the cut."""
    whole_tokens: int
    """Before it."""
    learnt_tokens: int
    segments: list[Segment]


class Sample(TypedDict):
    line: int
    flaws: list[Flaw]
    rows: list[ShownRow]


class Details(TypedDict):
    samples: list[Sample]
    lines: dict[Flaw, list[int]]
    """The first of each flaw."""


class ShownRows:
    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._lines: dict[Flaw, list[int]] = {flaw: [] for flaw in get_args(Flaw)}
        self._shown: set[Flaw] = {"duplicate"}
        """Flaws of which a sample is there. One of a row that is there twice would show nothing new."""

    def see(
        self, base: BaseText, example: Sequence[EncodedRow], kept: Sequence[list[Tokens]], flaws: set[Flaw]
    ) -> None:
        """example: one row, or the two of a pair. kept: the pieces of each, as trained; none where it is left out."""
        line = example[0].rendered.line
        for flaw in flaws:
            if len(self._lines[flaw]) < MAX_LINES:
                self._lines[flaw].append(line)
        if len(self._samples) < NUM_SAMPLES or flaws - self._shown:
            self._shown |= flaws
            parts = ("chosen", "rejected") if len(example) == 2 else (None,)
            rows = [_shown(base, *one) for one in zip(example, kept, parts, strict=True)]
            self._samples.append(Sample(line=line, flaws=sorted(flaws), rows=rows))

    def details(self) -> Details:
        return Details(samples=self._samples, lines=self._lines)


def _shown(base: BaseText, row: EncodedRow, kept: list[Tokens], part: str | None) -> ShownRow:
    """Of a row that is split the first piece; of one that is left out all, and none of it learnt."""
    ids, mask = kept[0] if kept else (row.ids, np.zeros_like(row.mask))
    texts = base.pieces(row.rendered, num_tokens=len(row.ids))
    tokens = [
        ShownToken(text=text[:MAX_PIECE_CHARS], id=int(ident), learnt=bool(learnt))
        for text, ident, learnt in zip(texts, ids, mask, strict=False)
    ]
    return ShownRow(
        part=part,
        num_tokens=len(ids),
        whole_tokens=len(row.ids),
        learnt_tokens=int(mask.sum()),
        segments=[Segment(start=start, tokens=tokens[start:stop]) for start, stop in _spans(mask.tolist())],
    )


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of a row's tokens that are shown."""
    length = len(mask)
    if length <= MAX_SHOWN:
        return [(0, length)]
    first = next((place for place, learnt in enumerate(mask) if learnt), HEAD)
    start = min(max(HEAD, first - BEFORE_LEARNT), length - (MAX_SHOWN - HEAD))
    if start == HEAD:
        return [(0, MAX_SHOWN)]
    return [(0, HEAD), (start, start + MAX_SHOWN - HEAD)]
