# pyright: basic
"""What a process loads for its first engine whatever the base model: compiled kernels, and what torch puts off.

Half a second that a trainer has before it has a base model. Nothing of it is kept by us: an engine afterwards is the
same, only sooner.
"""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core.base_model import load_base
from lora_core.engine import Engine
from lora_core.engine_config import EngineConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def warm_up(folder: Path) -> None:
    """Start an engine on a tiny random Llama on the CPU, in each dtype. `folder` holds it meanwhile."""
    with torch.random.fork_rng(devices=()):
        LlamaForCausalLM(LlamaConfig(**SIZES, dtype=torch.float32)).save_pretrained(folder)
    try:
        for dtype in ("bfloat16", "float32"):
            Engine(load_base(folder, dtype=dtype, device="cpu"), EngineConfig())
    finally:
        shutil.rmtree(folder)
