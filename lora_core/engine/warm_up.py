# pyright: basic
"""What a process loads for its first engine whatever the base model: compiled kernels, and what torch puts off.

Half a second that a trainer has before it has a base model. Nothing of it is kept by us: an engine afterwards is the
same, only sooner.
"""

import shutil
from pathlib import Path

from lora_core.base_model.model import load_base
from lora_core.base_model.tiny_llama import tiny_llama
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig


def warm_up(folder: Path) -> None:
    """Start an engine on a tiny random Llama on the CPU, in each dtype. `folder` holds it meanwhile."""
    try:
        tiny_llama().save_pretrained(folder)
        for dtype in ("bfloat16", "float32"):
            Engine(load_base(folder, dtype=dtype, device="cpu"), EngineConfig())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
