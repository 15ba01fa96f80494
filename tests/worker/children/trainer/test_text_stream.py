"""Pieces of text join to the decoded answer, and a stop sequence ends it wherever tokens split it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.worker.chat_bases import train_tokenizer
from worker.children.trainer.text_stream import TextStream

TOKENIZER = Tokenizer.from_str(train_tokenizer())
TEXTS = st.text(alphabet="ab Grüße世界😀👩‍👧\n<>", max_size=30)


def decode(ids: Any) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def streamed(ids: list[int], stops: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> list[str]:
    stream = TextStream(decode, prompt=prompt, stops=stops)
    return [*(stream.push(ident) for ident in ids), stream.finish()]


@given(text=TEXTS, prompt=TEXTS)
def test_pieces_join_to_the_text_without_half_characters(text: str, prompt: str) -> None:
    ids, before = TOKENIZER.encode(text).ids, TOKENIZER.encode(prompt).ids

    pieces = streamed(ids, prompt=tuple(before[-5:]))

    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_is_returned_as_soon_as_a_character_is_complete() -> None:
    ids = TOKENIZER.encode("a😀b").ids
    pieces = streamed(ids)

    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]
    assert pieces[0] == "a"


def test_incomplete_character_at_the_end_is_shown_as_such() -> None:
    ids = TOKENIZER.encode("a😀").ids[:-1]

    assert "".join(streamed(ids)).rstrip("\N{REPLACEMENT CHARACTER}") == "a"
    assert "".join(streamed(ids)) == decode(ids)


@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab <>世\n", min_size=1, max_size=4), max_size=3))
@example(text="><<", stops=["<", "><<"])
def test_text_ends_before_the_stop_sequence_that_is_complete_first(text: str, stops: list[str]) -> None:
    ends = ((index + len(stop), index) for stop in stops if (index := text.find(stop)) >= 0)
    first = min(ends, default=(0, len(text)))[1]

    pieces = streamed(TOKENIZER.encode(text).ids, tuple(stops))

    assert "".join(pieces) == text[:first]


def test_text_that_may_begin_a_stop_sequence_is_held_back_until_it_does_not() -> None:
    stream = TextStream(decode, stops=["<end>"])

    pieces = [stream.push(TOKENIZER.encode(character).ids[0]) for character in "a<enb<end>c"]

    assert pieces == ["a", "", "", "", "<enb", "", "", "", "", "", ""]
    assert stream.is_stopped
    assert stream.finish() == ""


def test_held_text_is_returned_at_the_end() -> None:
    assert "".join(streamed(TOKENIZER.encode("a<en").ids, ("<end>",))) == "a<en"


@pytest.mark.parametrize(("prompt", "expected"), [((), "b"), ((0,), " b")])
def test_answer_keeps_the_space_that_a_tokenizer_drops_at_the_start_of_a_text(
    prompt: tuple[int, ...], expected: str
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    stream = TextStream(lambda ids: tokenizer.decode(list(ids)), prompt=prompt)

    assert stream.push(1) + stream.finish() == expected
