"""The data report for users: rows token by token, lines of unusual rows, and the overlap of two files."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.worker.chat_bases import Base, train_tokenizer
from worker.children import data_overlap
from worker.children.tokenizer.main import prepare
from worker.children.tokenizer.preview import MAX_SHOWN, NUM_SAMPLES, ShownRows, ShownToken
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.tokenizer.token_file import TokenFile

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def shown(base: Base, *rows: dict[str, Any], max_length: int = 512) -> tuple[dict[str, Any], Path]:
    folder = base.folder.parent
    (folder / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, out = ShownRows(), folder / "tokens.safetensors"
    prepare(source=folder / "source.jsonl", base_dir=base.folder, max_length=max_length, out=out, shown=found)
    return json.loads(json.dumps(found.details())), out


def tokens(sample: dict[str, Any], row: int = 0) -> list[ShownToken]:
    return list(chain.from_iterable(segment["tokens"] for segment in sample["rows"][row]["segments"]))


def text(found: list[ShownToken], *, trained: bool | None = None) -> str:
    return "".join(token["text"] for token in found if trained is None or token["is_trained"] is trained)


@pytest.mark.parametrize("words", ["Hi there", "naïve 東京 🎉🎉 x", "  two  spaces\n\n\ttab "])
def test_the_tokens_of_a_row_join_to_its_text_and_trained_ones_to_its_answer(make_base: Any, words: str) -> None:
    details, _ = shown(make_base(TEMPLATE), chat("What?", words))

    (sample,) = details["samples"]
    assert text(tokens(sample)) == f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{words}<|im_end|>\n"
    assert text(tokens(sample), trained=True) == f"{words}<|im_end|>"


def test_the_end_token_of_a_plain_text_is_shown(make_base: Any) -> None:
    base = make_base(None)
    details, _ = shown(base, {"prompt": "A:", "completion": " b"})

    eos = BaseText(base.folder).eos
    assert eos is not None
    assert text(tokens(details["samples"][0])).endswith(f"A: b{eos[1]}")
    assert text(tokens(details["samples"][0]), trained=True) == f" b{eos[1]}"


def test_both_answers_of_a_pair_are_shown(make_base: Any) -> None:
    answers = {"preferred_output": "good", "non_preferred_output": "bad"}
    row: dict[str, Any] = {"input": {"messages": [{"role": "user", "content": "What?"}]}}
    row |= {name: [{"role": "assistant", "content": word}] for name, word in answers.items()}

    details, _ = shown(make_base(TEMPLATE), row)

    (sample,) = details["samples"]
    assert [found["part"] for found in sample["rows"]] == ["chosen", "rejected"]
    assert [text(tokens(sample, place), trained=True) for place in (0, 1)] == ["good<|im_end|>", "bad<|im_end|>"]


def test_unusual_rows_are_listed_and_the_first_of_each_kind_is_shown(make_base: Any) -> None:
    plain = [chat(f"Question {number}?", "Yes") for number in range(NUM_SAMPLES + 1)]
    rows = [*plain, plain[0], chat("Long?", "so " * 100), chat("Empty?", "No", weight=0), chat("x " * 90, "cut")]

    details, _ = shown(make_base(TEMPLATE), *rows, max_length=60)

    first = NUM_SAMPLES + 2
    assert details["lines"] == {
        "duplicate": [first],
        "too_long": [first + 1, first + 3],
        "empty": [first + 2, first + 3],
    }
    assert [sample["line"] for sample in details["samples"]] == [*range(1, NUM_SAMPLES + 1), first + 1, first + 2]
    (long,) = details["samples"][-2]["rows"]
    assert (long["num_tokens"], long["whole_tokens"] > 60) == (60, True)
    assert long["trained_tokens"] == sum(token["is_trained"] for token in tokens(details["samples"][-2]))


def test_a_long_row_shows_its_start_and_the_start_of_its_trained_tokens(make_base: Any) -> None:
    details, _ = shown(make_base(TEMPLATE), chat("word " * 400, "The answer"), max_length=4096)

    (row,) = details["samples"][0]["rows"]
    assert row["whole_tokens"] > MAX_SHOWN
    assert row["segments"][0]["start"] == 0
    assert len(tokens(details["samples"][0])) == MAX_SHOWN
    assert "The answer" in text(tokens(details["samples"][0]), trained=True)


def written(path: Path, *rows: list[int]) -> Path:
    with TokenFile(path) as out:
        for row in rows:
            out.add_row(np.array(row, dtype=np.int32), np.ones(len(row), dtype=np.uint8))
        out.finish()
    return path


def test_validation_rows_that_occur_in_training_are_each_counted(tmp_path: Path) -> None:
    train = written(tmp_path / "train", [1, 2, 3], [4, 5], [6])
    valid = written(tmp_path / "valid", [4, 5], [1, 2], [3], [6], [4, 5])

    assert data_overlap.count(train, valid, in_pairs=False) == (3, 5)


def test_pairs_overlap_only_if_both_answers_match(tmp_path: Path) -> None:
    train = written(tmp_path / "train", [1, 2], [3], [4], [5])
    valid = written(tmp_path / "valid", [1, 2], [3], [4], [6], [1], [2, 3])

    assert data_overlap.count(train, valid, in_pairs=True) == (1, 3)


SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
"""The decoder of Llama 2 and Mistral: the first token of a text loses its leading space."""


def sentencepiece() -> str:
    pieces = ["<unk>", "▁a", "▁lorry", "▁is", "▁red", "s", ".", "a"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = SENTENCEPIECE
    return tokenizer.to_str()


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_texts_of_tokens_join_to_the_text(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(sentencepiece() if kind == "sentencepiece" else train_tokenizer())
    text = BaseText(tmp_path)
    first, *rest = text.prompt_ids("a lorry is red.", as_chat=False)

    answer = [text.token_text(first, is_first=True), *(text.token_text(ident, is_first=False) for ident in rest)]

    assert len(rest) > 3
    assert "".join(answer) == text.text_of([first, *rest]) == "a lorry is red."
    after_a_prompt = text.token_text(first, is_first=False)
    assert after_a_prompt == (" a" if kind == "sentencepiece" else "a")
