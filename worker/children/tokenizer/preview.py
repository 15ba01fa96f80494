"""Single answers with labels as text: each after its prompt, and nothing but the answer learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict, get_args

import numpy as np

from catalog.datasets.rows import LabeledAnswer, PreferencePair, turns_of
from worker.children.tokenizer.chat_template import ChatTemplate, Refused, Rendered
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.tokenizer.token_file import EncodedRow, Flaw, Tokens


def render_labeled(base: BaseText, row: LabeledAnswer) -> Rendered:
    """Raises Refused."""
    turns = turns_of(row["answer"])
    if turns is None:
        rendered = base.render("completion", row["answer"], loss="assistant")
    else:
        rendered = base.template.render_last(turns)
    return replace(rendered, is_desirable=row["is_desirable"])


def refuse_one_label(num_rows: int, num_desirable: int) -> None:
    """Where all answers are called the same there is nothing to tell apart, and training would only make all of them
    likelier, which plain answers teach better, or all of them unlikely. Raises Refused."""
    if 0 < num_desirable < num_rows:
        return
    label = "true" if num_desirable else "false"
    instead = "or learn these by the method supervised, without labels" if num_desirable else "or remove the file"
    raise Refused(
        "single_label_dataset",
        f"All {num_rows} answers that are trained on have the label {label}, so there is nothing to tell apart.",
        f"Add answers with the other label, {instead}.",
    )


def render_pair(template: ChatTemplate, pair: PreferencePair) -> tuple[Rendered, Rendered]:
    """(chosen, rejected). Raises Refused."""
    chosen, rejected = (
        template.render_last([*pair["prompt"], answer]) for answer in (pair["preferred"], pair["rejected"])
    )
    if _prompt(chosen) != _prompt(rejected):
        raise Refused(
            "template_changes_prompt",
            "The base's chat template writes the prompt differently for each of the two answers.",
            "Remove the row, or add the base again with a template that doesn't look ahead.",
        )
    return chosen, rejected


def are_equal(rows: Sequence[Tokens]) -> bool:
    """Of a pair, that nothing is left to compare once it was cut; one row alone is never so."""
    return len(rows) == 2 and np.array_equal(rows[0][0], rows[1][0])


def nothing_to_compare(num_pairs: int, longest: int, max_length: int) -> Refused:
    """longest: tokens of the longest prompt with an answer."""
    return Refused(
        "nothing_to_learn",
        f"None of the {num_pairs} pairs has two answers that differ within the first {max_length} tokens, the prompt "
        "included.",
        f"Shorten the prompts, or raise max_length (the longest prompt with its answer has {longest} tokens).",
    )


def _prompt(rendered: Rendered) -> str:
    return rendered.text[: rendered.spans[0][0]] if rendered.spans else rendered.text


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
    is_trained: bool


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
    trained_tokens: int
    segments: list[Segment]


class PreviewSample(TypedDict):
    line: int
    flaws: list[Flaw]
    rows: list[ShownRow]


class PreviewDetails(TypedDict):
    samples: list[PreviewSample]
    lines: dict[Flaw, list[int]]
    """The first of each flaw."""


class ShownRows:
    def __init__(self) -> None:
        self._samples: list[PreviewSample] = []
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
            self._samples.append(PreviewSample(line=line, flaws=sorted(flaws), rows=rows))

    def details(self) -> PreviewDetails:
        return PreviewDetails(samples=self._samples, lines=self._lines)


def _shown(base: BaseText, row: EncodedRow, kept: list[Tokens], part: str | None) -> ShownRow:
    """Of a row that is split the first piece; of one that is left out all, and none of it learnt."""
    ids, mask = kept[0] if kept else (row.ids, np.zeros_like(row.mask))
    texts = base.pieces(row.rendered, num_tokens=len(row.ids))
    tokens = [
        ShownToken(text=text[:MAX_PIECE_CHARS], id=int(ident), is_trained=bool(learnt))
        for text, ident, learnt in zip(texts, ids, mask, strict=False)
    ]
    return ShownRow(
        part=part,
        num_tokens=len(ids),
        whole_tokens=len(row.ids),
        trained_tokens=int(mask.sum()),
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
