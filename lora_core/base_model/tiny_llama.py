# pyright: basic
"""A random language model of a hundred thousand numbers whose tokens are bytes: for an example and for a warm-up."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

NUM_BYTES = 256


def tiny_llama() -> LlamaForCausalLM:
    """In float32, the same each time; torch's random numbers go on as if it had not been made."""
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)
