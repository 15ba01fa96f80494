"""Tiny random model folders of each family that can be written as GGUF, with a tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch

from tests import tiny_base, tiny_models

COMMON: dict[str, Any] = tiny_models.COMMON | {"vocab_size": tiny_base.VOCABULARY, "bos_token_id": 0}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}, "rms_norm_eps": 1e-3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA_3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 64, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save(family: str, folder: Path, **options: Any) -> Path:
    """Save a model whose norms and biases have distinct values, so that mistaking one for another has an effect."""
    model_type, settings = FAMILIES[family]
    model = tiny_models.build(model_type, **COMMON | settings | options)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    source = folder / "source"
    tiny_base._build_tokenizer(source)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
    shutil.rmtree(source)
