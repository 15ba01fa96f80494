"""A tiny random Gemma 3 with a SentencePiece tokenizer, as an import from a GGUF file leaves it: no tokenizer.model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from tests import tiny_base, tiny_models
from tests.lora_core.gguf_format.families import COMMON

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
VOCABULARY = 384
SPACE = "\u2581"
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def save(folder: Path) -> Path:
    """Save a model whose norms have distinct values, and whose heads have the size that llama.cpp assumes to scale."""
    options = COMMON | {"vocab_size": VOCABULARY, "num_hidden_layers": 7, "head_dim": 256, "sliding_window": 16}
    options |= {"query_pre_attn_scalar": 256, "rope_parameters": ROPE}
    options |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = tiny_models.build("gemma3_text", **options)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *bytes_], show_progress=False, max_token_length=8
    )
    texts = [message["content"] for row in tiny_base.chat_rows(400) for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"bos_token": "<bos>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False})
    )
