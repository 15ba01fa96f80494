"""A GPU draws its random numbers unless there is a reason against its kernels.

Triton is replaced here. tests/lora_core/kernels/gpu/interpreted/test_random_numbers.py tests the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.adapter.initialization import DRAWING_WORK, initial_a, start_work
from lora_core.config import LoraConfig
from lora_core.kernels import drawing
from lora_core.packing.packed_batch import DropoutKey, NoiseKey
from lora_core.runtime.counter_rng import philox_key

MODULE = "lora_core.kernels.gpu.random_numbers"
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
KEY = DropoutKey(probability=0.25, seed=1, step=2, slice_index=3)


def with_kernels(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    module = ModuleType(MODULE)
    vars(module).update(draw_mask=kernel, draw_within=kernel)
    monkeypatch.setitem(sys.modules, MODULE, module)


class OnCuda:
    """A tensor of a GPU, as far as `mask_like` reads it."""

    device, shape = CUDA, (3, 8)

    def numel(self) -> int:
        return 24


@pytest.fixture(params=[None, "no C compiler"], ids=["by the device", "by the host"])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why the device does not draw. Uploads stay on the host."""
    why = {CUDA: request.param}
    monkeypatch.setattr(drawing, "reason_against", lambda _family, device: why.get(device, "another device"))
    monkeypatch.setattr(drawing, "upload", lambda arrays, _device: [torch.from_numpy(array) for array in arrays])
    return request.param


def test_gpu_draws_a_mask_unless_there_is_a_reason_against_it(
    monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    drawn: list[tuple[list[int], int, Any]] = []

    def draw_mask(key: Any, threshold: int, like: Any) -> Tensor:
        drawn.append((key.tolist(), threshold, like))
        return torch.zeros(3, 8)

    with_kernels(monkeypatch, draw_mask)
    like: Any = OnCuda()

    mask = KEY.keep_TD("q_proj", like)

    if reason is None:
        assert drawn == [(KEY.philox_keys(["q_proj"])[0].tolist(), 49152, like)]
    else:
        assert drawn == []
        assert torch.equal(mask, KEY.keep_TD("q_proj", torch.empty(3, 8)))


NOISE = NoiseKey(alpha=5.0, seed=1, step=2, slice_index=3, lengths=(40, 10))
DRAWN: dict[str, tuple[tuple[int | str, ...], int, list[float], Callable[[torch.device], Tensor]]] = {
    "initial weights": (
        ("lora_A", 7, "q_proj"),
        64,
        [64**-0.5] * 4,
        lambda device: initial_a(LoraConfig(rank=4, alpha=8), "q_proj", 64, seed=7, device=device),
    ),
    "noise": (
        ("neftune", 1, 2, 3),
        16,
        [5 / 640**0.5] * 40 + [5 / 160**0.5] * 10,
        lambda device: NOISE.noise_tD(16, device),
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_gpu_draws_uniform_numbers_unless_there_is_a_reason_against_it(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, name: str
) -> None:
    key, num_columns, bounds, draw = DRAWN[name]
    drawn: list[tuple[list[int], list[float], int]] = []

    def draw_within(key: Any, bounds_M: Tensor, num_columns: int) -> Tensor:
        drawn.append((key.tolist(), bounds_M.tolist(), num_columns))
        return torch.zeros(len(bounds_M), num_columns)

    with_kernels(monkeypatch, draw_within)

    numbers = draw(CUDA)

    if reason is None:
        assert drawn == [(philox_key(*key).tolist(), bounds, num_columns)]
    else:
        assert drawn == []
        assert torch.equal(numbers, draw(CPU))


@pytest.mark.parametrize("kind", ["default", "gaussian"])
def test_initialization_drawn_by_the_device_delays_no_tick(reason: str | None, kind: Any) -> None:
    lora = LoraConfig(rank=16, alpha=16, init_lora_weights=kind)

    work = start_work(lora, "q_proj", (4096, 4096), CUDA)

    assert work == 16 * 4096 * (1 if reason is None and kind == "default" else DRAWING_WORK)
