# pyright: basic
"""A random language model with 100,000 parameters and bytes as tokens, for an example and for warm-up."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

NUM_BYTES = 256


def tiny_llama() -> LlamaForCausalLM:
    """Return the same float32 model each time. The state of torch's random number generator does not change."""
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
