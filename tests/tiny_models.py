"""Tiny random models of every family, saved as folders. Sizes are multiples of 64."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.lora_core.scenarios import VOCAB

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}


def build(family: str, *, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return a model with the weights of seed 0. kind: the class that builds it from its configuration."""
    torch.manual_seed(0)
    settings = {
        name: value for name, value in (COMMON | options).items() if (family, name) != ("opt", "intermediate_size")
    }
    return kind.from_config(AutoConfig.for_model(family, **settings))


def save(family: str, folder: Path, *, kind: Any = AutoModelForCausalLM, **options: Any) -> Path:
    build(family, kind=kind, **options).save_pretrained(folder)
    return folder
