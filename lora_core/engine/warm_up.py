# pyright: basic
"""Loads what every engine needs, whatever its base model: compiled kernels and modules that torch imports lazily.

It saves half a second when a warm standby trainer gets its base model. Results do not change.
"""

import shutil
from pathlib import Path

from lora_core.base_model.model import load_base
from lora_core.base_model.tiny_llama import tiny_llama
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig


def warm_up(folder: Path) -> None:
    """Start an engine on a tiny random Llama on the CPU, once per dtype. `folder` is created and deleted again."""
    try:
        tiny_llama().save_pretrained(folder)
        for dtype in ("bfloat16", "float32"):
            Engine(load_base(folder, dtype=dtype, device="cpu"), EngineConfig())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
