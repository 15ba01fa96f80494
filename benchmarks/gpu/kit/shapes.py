"""Base models of known sizes with random weights, created on the device. Weight values don't affect speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers import LlamaConfig

from lora_core.base_model.model import BaseModel, build_model
from lora_core.base_model.patching import find_linears


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a Llama model. With `tied`, the output head is the embedding table."""

    name: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "1b": Shape(name="1b", hidden=2048, feed_forward=8192, layers=16, heads=32, key_heads=8, vocab=128_256, tied=True),
    "8b": Shape(
        name="8b", hidden=4096, feed_forward=14_336, layers=32, heads=32, key_heads=8, vocab=128_256, tied=False
    ),
}
TOY = Shape(name="toy", hidden=64, feed_forward=128, layers=2, heads=4, key_heads=2, vocab=320, tied=False)


def build(shape: Shape, *, device: str) -> BaseModel:
    """Create a frozen bfloat16 model."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=shape.tied,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(config)
    model.to(torch.bfloat16).requires_grad_(False).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    return BaseModel(model=model, dtype=torch.bfloat16, device=device)


def block_weights(base: BaseModel) -> list[torch.Tensor]:
    """Return the weights of the blocks' linears, which multiply every token. Excludes embedding and output head."""
    return [cast(torch.Tensor, linear.weight) for linear in find_linears(base.model).values()]
