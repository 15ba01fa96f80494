"""An engine with tiled LoRA trains like one with the loop, also when blocks are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.kernels.selection import Kernels
from tests.lora_core.scenarios import Submission, config, dataset


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe makes dozens of passes, which take minutes in the interpreter."""
    monkeypatch.setattr("lora_core.engine.engine.measure_invariance", lambda base, lanes: "allclose")


def trained(base: BaseModel, kernels: Kernels, checkpoint: Literal["never", "always"] = "never") -> dict[str, Tensor]:
    """Return the weights after two steps of jobs that differ in rank, targets, dropout and slices."""
    base.attachment = Attachment(base.model, kernels)
    engine = Engine(base, EngineConfig(checkpoint_blocks=checkpoint))
    jobs = {
        "four": Submission(config=config(rank=4, seed=1, num_steps=2), train=dataset(1, [7, 12])),
        "dropout": Submission(
            config=config(rank=8, seed=2, num_steps=2, dropout=0.25, slice_tokens=16, targets=("q_proj", "v_proj")),
            train=dataset(2, [9, 12]),
        ),
        "top": Submission(
            config=config(rank=3, seed=3, num_steps=2, targets=("1.mlp.down_proj",)), train=dataset(3, [6, 9])
        ),
    }
    for name, job in jobs.items():
        engine.admit(name, job.config, job.train)
    while not engine.idle:
        engine.tick()
    weights = {name: job.adapter.p.clone() for name, job in engine._jobs.items()}
    base.attachment.detach()
    base.attachment = None
    return weights


def test_tiled_engine_trains_like_a_looping_engine(load: Callable[..., BaseModel]) -> None:
    base = load("llama")
    loop = trained(base, Kernels(lora="loop"))

    tiled = trained(base, Kernels(lora="tiled"))

    for name, expected in loop.items():
        assert float((tiled[name] - expected).norm() / expected.norm()) < 1e-4


def test_recomputed_blocks_give_the_same_bits(load: Callable[..., BaseModel]) -> None:
    base = load("llama")
    kept = trained(base, Kernels(lora="tiled"))

    recomputed = trained(base, Kernels(lora="tiled"), "always")

    assert all(torch.equal(recomputed[name], weights) for name, weights in kept.items())
