"""Tiny random base models on disk, made once per session. Tests use one thread, like a worker on a CPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine.invariance_probe import Invariance, measure_invariance
from lora_core.model_files.import_base import import_base
from lora_core.runtime.cpu_lanes import Lanes
from tests.lora_core.exports import trained
from tests.lora_core.scenarios import VOCAB


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse the probe result of the first engine for later engines on the same base.

    The probe of a tiny base costs more than many jobs. tests/lora_core/engine/test_invariance_probe.py turns this off.
    """
    known: list[tuple[BaseModel, Invariance]] = []

    def measure(base: BaseModel, lanes: Lanes) -> Invariance:
        for probed, verdict in known:
            if probed is base:
                return verdict
        known.append((base, measure_invariance(base, lanes)))
        return known[-1][1]

    monkeypatch.setattr("lora_core.engine.engine.measure_invariance", measure)


@pytest.fixture(scope="session")
def base_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an untied Llama with grouped-query attention and a tied GPT-2, in fp32. Sizes are multiples of 64."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.1,
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1)
    )
    root = tmp_path_factory.mktemp("bases")
    for name, model in {"llama": llama, "gpt2": gpt2}.items():
        model.save_pretrained(root / name)
    return {"llama": root / "llama", "gpt2": root / "gpt2"}


@pytest.fixture(scope="session")
def real_base_dir(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real language model, imported."""
    folder = tmp_path_factory.mktemp("real") / "base"
    import_base(source=str(real_gguf), kind="gguf", revision=None, target_dir=folder)
    return folder


@pytest.fixture
def load(base_dirs: dict[str, Path]) -> Callable[..., BaseModel]:
    """load(family, dtype="float32")."""
    return partial(_load, base_dirs)


def _load(base_dirs: dict[str, Path], family: str, dtype: Literal["float32", "bfloat16"] = "float32") -> BaseModel:
    return load_base(base_dirs[family], dtype=dtype, device="cpu")


@pytest.fixture
def exported(load, tmp_path: Path) -> tuple[BaseModel, Path]:
    base = load("llama")
    trained(base).export("job", tmp_path / "adapter", base_name="tiny/llama")
    return base, tmp_path / "adapter"
