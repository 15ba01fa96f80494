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


WIDE = st.text(alphabet="ab Grüße世界人😀👩‍👧\n", max_size=200)
SPECIAL = "<s>"


class Counted:
    """A decoder that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = 0

    def __call__(self, ids: Any) -> str:
        self.num_tokens += len(ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def with_vocabulary(tokens: list[str], decoder: Any) -> tuple[Tokenizer, dict[str, int]]:
    vocabulary = {token: ident for ident, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer, {**vocabulary, SPECIAL: len(vocabulary)}


def letters_of_bytes() -> dict[int, str]:
    """Return the letter of each byte in byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def byte_level(text: str, sizes: list[int]) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer whose tokens are the pieces of the text with these numbers of bytes, and their ids."""
    letters = letters_of_bytes()
    written = "".join(letters[byte] for byte in text.encode())
    pieces: list[str] = []
    while written:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(written[:size])
        written = written[size:]
    tokenizer, ids = with_vocabulary(["!", *pieces], decoders.ByteLevel())
    return tokenizer, [ids[piece] for piece in pieces]


def byte_fallback(text: str, known: str) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer as of Llama 2 with the tokens `known` and those of all bytes, and the ids of the text."""
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *known]
    tokenizer, ids = with_vocabulary(tokens, decoders.Sequence(list(steps)))
    written = text.replace(" ", "▁")
    parts = [[letter] if letter in known else [f"<0x{byte:02X}>" for byte in letter.encode()] for letter in written]
    return tokenizer, [ids[token] for part in parts for token in part]


def check(tokenizer: Tokenizer, ids: list[int], runs: dict[int, int]) -> None:
    """Check a stream of the tokens, with runs of special tokens before those at some places."""
    special: Any = tokenizer.token_to_id(SPECIAL)
    given = [each for place, ident in enumerate(ids) for each in (*[special] * runs.get(place, 0), ident)]
    decode = Counted(tokenizer)
    stream = TextStream(decode)

    pieces = [*(stream.push(ident) for ident in given), stream.finish()]

    assert "".join(pieces) == tokenizer.decode(given, skip_special_tokens=True)
    assert decode.num_tokens <= 150 * (len(given) + 1)


RUNS = st.dictionaries(st.integers(0, 300), st.integers(1, 200), max_size=4)


@given(text=WIDE, sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), runs=RUNS)
@example(text="人" * 200, sizes=[1, *[3] * 199], runs={})
@example(text="人a" * 100, sizes=[2], runs={1: 200, 2: 200, 150: 64})
def test_stream_of_byte_level_tokens_is_their_text(text: str, sizes: list[int], runs: dict[int, int]) -> None:
    check(*byte_level(text, sizes), runs)


@given(text=WIDE, known=st.sampled_from(["▁", "ab▁", "▁Grüße世"]), runs=RUNS)
@example(text=" 人a", known="a▁", runs={0: 200, 1: 70, 2: 200, 3: 65})
@example(text="  a", known="a▁", runs={1: 200, 2: 64})
def test_stream_of_byte_fallback_tokens_is_their_text(text: str, known: str, runs: dict[int, int]) -> None:
    check(*byte_fallback(text, known), runs)


@pytest.mark.parametrize("before", ["", "a", "人"])
def test_tokens_without_text_are_decoded_a_bounded_number_of_times(before: str) -> None:
    tokenizer, ids = byte_fallback(before + "a", "a")

    check(tokenizer, ids, {len(ids) - 1: 8000})


def test_invalid_text_is_decoded_in_linear_time_and_loses_no_text_after_it() -> None:
    tokenizer, (byte, *_, letter) = byte_fallback("人a", "a")
    decode = Counted(tokenizer)
    stream = TextStream(decode)

    pieces = [stream.push(ident) for ident in [*[byte] * 1000, letter]]

    assert "".join([*pieces, stream.finish()]) == "\N{REPLACEMENT CHARACTER}" * 1000 + "a"
    assert decode.num_tokens <= 150 * 1001
