"""The texts of single tokens join to the text of all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.worker.chat_bases import train_tokenizer
from worker.children.tokenizer.text_encoder import BaseText

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
