"""Renders pairs and labeled answers as text, and collects sample rows for the preview of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict, get_args

import numpy as np

from catalog.datasets.chat import Chat
from catalog.datasets.rows import LabeledAnswer, PreferencePair, conversation_of
from worker.children.tokenizer.chat_template import Refused, Rendered
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.tokenizer.token_file import EncodedRow, Flaw, Tokens


def render_labeled(base: BaseText, row: LabeledAnswer) -> Rendered:
    """Render an answer with a label after its prompt. Only the answer is trained on. Raises Refused."""
    chat = conversation_of(row["answer"])
    if chat is None:
        rendered = base.render("completion", row["answer"], loss="assistant")
    else:
        rendered = base.template_of(chat).render_last(chat)
    return replace(rendered, is_desirable=row["is_desirable"])


def refuse_one_label(num_rows: int, num_desirable: int) -> None:
    """Raise Refused if all answers have the same label. Training would then make all of them more likely, for which the
    supervised method is better, or all of them less likely."""
    if 0 < num_desirable < num_rows:
        return
    raise Refused("only_desirable_answers" if num_desirable else "only_undesirable_answers", num_rows=num_rows)


def render_pair(base: BaseText, pair: PreferencePair) -> tuple[Rendered, Rendered]:
    """Render a pair. Returns (chosen, rejected). Raises Refused."""
    prompt = pair["prompt"]
    template = base.template_of(prompt)
    chosen, rejected = (
        template.render_last(Chat([*prompt.messages, answer], prompt.tools))
        for answer in (pair["preferred"], pair["rejected"])
    )
    if _prompt(chosen) != _prompt(rejected):
        raise Refused("template_changes_prompt_by_answer")
    return chosen, rejected


def are_equal(rows: Sequence[Tokens]) -> bool:
    """Return whether the rows of a pair are equal after truncation. False for a single row."""
    return len(rows) == 2 and np.array_equal(rows[0][0], rows[1][0])


def nothing_to_compare(num_pairs: int, longest: int, max_length: int) -> Refused:
    """Return the error for a file without usable pairs. longest: tokens of the longest prompt with an answer."""
    return Refused("nothing_to_compare", num_pairs=num_pairs, max_length=max_length, longest=longest)


def _prompt(rendered: Rendered) -> str:
    return rendered.text[: rendered.spans[0][0]] if rendered.spans else rendered.text


NUM_SAMPLES = 3
"""Number of first rows that are shown. The first row with each flaw is shown in addition."""
MAX_LINES = 20
"""Maximum number of lines that are listed for each flaw."""
MAX_SHOWN = 240
"""Maximum number of tokens that are shown of one row."""
HEAD, BEFORE_TRAINED = 60, 30
"""For a longer row: the number of its first tokens that are shown, and the number of tokens that are shown before the
first trained token."""
MAX_PIECE_CHARS = 200


class ShownToken(TypedDict):
    text: str
    id: int
    is_trained: bool


class Segment(TypedDict):
    """Consecutive tokens. start: the position of the first one in its row, from 0."""

    start: int
    tokens: list[ShownToken]


class ShownRow(TypedDict):
    part: str | None
    """For a pair: chosen or rejected."""
    num_tokens: int
    """Tokens after truncation."""
    whole_tokens: int
    """Tokens before truncation."""
    trained_tokens: int
    segments: list[Segment]


class PreviewSample(TypedDict):
    line: int
    flaws: list[Flaw]
    rows: list[ShownRow]


class PreviewDetails(TypedDict):
    samples: list[PreviewSample]
    lines: dict[Flaw, list[int]]
    """The first lines with each flaw."""


class ShownRows:
    def __init__(self) -> None:
        self._samples: list[PreviewSample] = []
        self._lines: dict[Flaw, list[int]] = {flaw: [] for flaw in get_args(Flaw)}
        self._shown: set[Flaw] = {"duplicate"}
        """Flaws that need no further sample. A sample of a duplicate would show nothing new."""

    def see(
        self, base: BaseText, example: Sequence[EncodedRow], kept: Sequence[list[Tokens]], flaws: set[Flaw]
    ) -> None:
        """Add an example to the preview if it is one of the first, or the first with a flaw.

        example: one row, or the two rows of a pair. kept: the pieces of each row that are trained on; none if the row
        is dropped.
        """
        line = example[0].rendered.line
        for flaw in flaws:
            if len(self._lines[flaw]) < MAX_LINES:
                self._lines[flaw].append(line)
        if len(self._samples) < NUM_SAMPLES or flaws - self._shown:
            self._shown |= flaws
            parts = ("chosen", "rejected") if len(example) == 2 else (None,)
            rows = [_shown(base, *one) for one in zip(example, kept, parts, strict=True)]
            self._samples.append(PreviewSample(line=line, flaws=sorted(flaws), rows=rows))

    def details(self) -> PreviewDetails:
        return PreviewDetails(samples=self._samples, lines=self._lines)


def _shown(base: BaseText, row: EncodedRow, kept: list[Tokens], part: str | None) -> ShownRow:
    """Return a row for the preview. For a split row, it is the first piece. A dropped row is complete, without trained
    tokens."""
    ids, mask = kept[0] if kept else (row.ids, np.zeros_like(row.mask))
    texts = base.pieces(row.rendered, num_tokens=len(row.ids))
    tokens = [
        ShownToken(text=text[:MAX_PIECE_CHARS], id=int(ident), is_trained=bool(is_trained))
        for text, ident, is_trained in zip(texts, ids, mask, strict=False)
    ]
    return ShownRow(
        part=part,
        num_tokens=len(ids),
        whole_tokens=len(row.ids),
        trained_tokens=int(mask.sum()),
        segments=[Segment(start=start, tokens=tokens[start:stop]) for start, stop in _spans(mask.tolist())],
    )


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return the half-open ranges of a row's tokens that are shown."""
    length = len(mask)
    if length <= MAX_SHOWN:
        return [(0, length)]
    first = next((place for place, is_trained in enumerate(mask) if is_trained), HEAD)
    start = min(max(HEAD, first - BEFORE_TRAINED), length - (MAX_SHOWN - HEAD))
    if start == HEAD:
        return [(0, MAX_SHOWN)]
    return [(0, HEAD), (start, start + MAX_SHOWN - HEAD)]
