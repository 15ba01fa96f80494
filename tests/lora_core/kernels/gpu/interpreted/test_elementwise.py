"""The elementwise and loss kernels of a GPU give the results of a CPU's, and so does a model that uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.kernels import elementwise as on_cpu
from lora_core.kernels.gpu import elementwise as on_cuda
from lora_core.kernels.gpu.comparison import reason_against
from lora_core.kernels.numba_jit import array_of
from tests.lora_core.kernels.gpu.packs import numbers
from tests.lora_core.scenarios import config, dataset

T, D, C, V = 5, 80, 3, 5000


def assert_equal_results(name: str, inputs: list[Any], outputs: list[Tensor]) -> None:
    """Run a kernel of each device in fp32: the interpreter rounds to bf16 toward zero, other than a device."""
    expected, found = ([output.clone() for output in outputs] for _ in range(2))

    getattr(on_cpu, name)(*[array_of(part) if isinstance(part, Tensor) else part for part in [*inputs, *expected]])
    getattr(on_cuda, name)(*inputs, *found)

    for reference, output in zip(expected, found, strict=True):
        torch.testing.assert_close(output, reference, rtol=2e-6, atol=1e-6)


def test_gated_activation_and_its_gradient() -> None:
    gate, up, dy = (3 * numbers(seed, 1, 1500)[0] for seed in (1, 2, 3))
    empty = torch.empty_like(gate)

    assert_equal_results("swiglu", [gate, up], [empty])
    assert_equal_results("swiglu_backward", [gate, up, dy], [empty, empty])


def test_norm_with_and_without_a_residual_sum_and_its_gradient() -> None:
    x, delta, dy, onward = (numbers(seed, T, D) for seed in (1, 2, 3, 4))
    weight, rate, empty = numbers(5, 1, D)[0], torch.rand(T) + 0.5, torch.empty_like(x)

    assert_equal_results("rms_norm", [x, weight, 1e-5], [empty, rate])
    assert_equal_results("add_rms_norm", [x, delta, weight, 1e-5], [empty, empty, rate])
    assert_equal_results("rms_norm_backward", [x, rate, weight, dy, onward], [empty])
    assert_equal_results("rms_norm_backward", [x, rate, weight, dy, onward[:0]], [empty])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_recomputed_bit_for_bit(dtype: torch.dtype) -> None:
    x, delta = (numbers(seed, T, D).to(dtype) for seed in (1, 2))
    weight, rate = numbers(3, 1, D)[0].to(dtype), torch.empty(T)
    total, y, again = (torch.empty_like(x) for _ in range(3))

    on_cuda.add_rms_norm(x, delta, weight, 1e-5, total, y, rate)
    on_cuda.rms_norm_with_rate(total, rate, weight, again)
    assert torch.equal(again, y)

    on_cuda.rms_norm(x, weight, 1e-5, y, rate)
    on_cuda.rms_norm_with_rate(x, rate, weight, again)
    assert torch.equal(again, y)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rotated", [16, 6])
def test_rotation_of_whole_heads_and_of_parts(backward: bool, rotated: int) -> None:
    num_heads, size, gap = 3, 16, 4
    source = numbers(1, T, num_heads * (size + gap)).flatten()  # heads are apart, as in a fused projection
    cos, sin = (numbers(seed, 1, T * rotated)[0] for seed in (2, 3))
    strides = num_heads * (size + gap), size + gap
    empty = torch.empty(T * num_heads * size)

    assert_equal_results("rotate", [source, *strides, cos, sin, T, num_heads, size, backward], [empty])


@pytest.mark.parametrize("smoothed", [False, True])
def test_cross_entropy_and_its_gradient_in_place(smoothed: bool) -> None:
    logits, weights = 5 * numbers(1, C, V), torch.tensor([0.5, 1.0, 2.0])
    labels = torch.tensor([4999, 17, int(logits[2].argmax())])
    smoothing = torch.tensor([0.0, 0.1, 0.2]) if smoothed else torch.empty(0)
    outputs = [torch.empty(C), torch.empty(C, dtype=torch.bool), torch.empty(C), torch.empty(C)]

    assert_equal_results("score_logits", [logits, labels, smoothing], outputs)
    on_cpu.score_logits(*map(array_of, [logits, labels, smoothing, *outputs]))
    in_place, expected = logits.clone(), logits.clone()
    _, correct, largest, sums = outputs
    on_cuda.logit_gradient(in_place, labels, weights, smoothing, largest, sums)
    on_cpu.logit_gradient(*map(array_of, [expected, labels, weights, smoothing, largest, sums]))

    assert correct.tolist() == [False, False, True]
    torch.testing.assert_close(in_place, expected, rtol=2e-5, atol=1e-7)


def test_rows_do_not_depend_on_other_rows() -> None:
    x, weight = numbers(1, T, D), numbers(2, 1, D)[0]
    together, alone, rates = torch.empty_like(x), torch.empty_like(x), torch.empty(T)
    on_cuda.rms_norm(x, weight, 1e-6, together, rates)

    for row in range(T):
        on_cuda.rms_norm(x[row : row + 1], weight, 1e-6, alone[row : row + 1], rates)

    assert torch.equal(alone, together)


def test_model_with_these_kernels_trains_like_one_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., BaseModel]
) -> None:
    expected = trained(load("llama"))
    names = ("swiglu", "add_rms_norm", "rms_norm_backward", "rotate", "score_logits", "logit_gradient")
    ran = counted(monkeypatch, *names)
    monkeypatch.setattr("lora_core.engine.engine.measure_invariance", lambda base, lanes: "allclose")
    monkeypatch.setattr("lora_core.kernels.on_device.on_gpu", lambda tensor: True)

    found = trained(load("llama"))

    assert ran.keys() == set(names)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_recomputed_inputs_give_the_bits_of_kept_ones(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., BaseModel], checkpoint: Literal["never", "always"]
) -> None:
    monkeypatch.setattr("lora_core.engine.engine.measure_invariance", lambda base, lanes: "allclose")
    monkeypatch.setattr("lora_core.kernels.on_device.on_gpu", lambda tensor: True)
    reason_against("elementwise", torch.device("cpu"))  # it runs kernels, once
    ran = counted(monkeypatch, "swiglu", "rms_norm_with_rate")
    recomputed = trained(load("llama"), checkpoint)
    recomputing = dict(ran)
    ran.clear()

    for user in ("base_model.patching", "layers.fused_projections"):
        monkeypatch.setattr(f"lora_core.{user}.origin_of", lambda _: None)
    kept = trained(load("llama"), checkpoint)

    assert torch.equal(recomputed, kept)
    num_steps, num_blocks = 2, cast(Any, load("llama").model.config).num_hidden_layers
    assert recomputing["swiglu"] - ran["swiglu"] == num_steps * num_blocks, "once for each MLP"
    num_norms = 2 * num_blocks - 1  # the input of the first has no gradient
    assert recomputing["rms_norm_with_rate"] - ran["rms_norm_with_rate"] == num_steps * num_norms


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> Counter[str]:
    """Count the launches of kernels by their name."""
    ran = Counter[str]()
    for name in names:
        original = getattr(on_cuda, name)
        monkeypatch.setattr(on_cuda, name, lambda *args, name=name, run=original: (ran.update([name]), run(*args)))
    return ran


def trained(base: BaseModel, checkpoint: Literal["never", "always"] = "never") -> Tensor:
    """Return the weights of a job after two steps."""
    base.attachment = Attachment(base.model)
    engine = Engine(base, EngineConfig(checkpoint_blocks=checkpoint))
    engine.admit("job", config(seed=1, num_steps=2), dataset(1, [7, 12]))
    while not engine.idle:
        engine.tick()
    return engine._jobs["job"].adapter.p.clone()
