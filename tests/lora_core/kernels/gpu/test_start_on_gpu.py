"""An engine prepares its GPU before anything is launched to it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.kernels.gpu import comparison

SECOND = torch.device("cuda:1")


class Attached(Exception):
    """The engine attaches itself to its base model."""


def attach(**_: object) -> NoReturn:
    raise Attached


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with two GPUs. Returns what happened to them, in order."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(f"current device {device}"))
    monkeypatch.setattr(comparison, "compare", lambda _family, device, *_: found.append(f"comparison on {device}"))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    yield found
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def test_comparison_runs_after_its_device_has_become_the_current_one(second_gpu: list[str]) -> None:
    """Triton launches to the current device, which is the first one until another is chosen."""
    base: Any = SimpleNamespace(is_sharded=False, device="cuda:1", model=SimpleNamespace(device=SECOND), attach=attach)

    with pytest.raises(Attached):
        Engine(base, EngineConfig())

    assert second_gpu == ["current device cuda:1", *["comparison on cuda:1"] * 2]
