"""Norms and gated activations for a GPU. They run uncompiled here, except in one slow test. A CPU uses other code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CohereConfig
from transformers.models.cohere.modeling_cohere import CohereForCausalLM

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.config import LoraConfig
from lora_core.kernels import gpu_elementwise as kernel_compiled_elementwise
from lora_core.kernels import selection
from lora_core.kernels.gpu_elementwise import swiglu, why_not
from lora_core.kernels.selection import Kernels, choose_kernels
from lora_core.layers import compiled_elementwise as layer_compiled_elementwise
from lora_core.layers.compiled_elementwise import FusedNorm, FusedRotate, FusedSwiglu, fused_parts
from lora_core.layers.rotary import faster_rotations
from lora_core.packing.packed_batch import SliceInput, bare_pack, running


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_compiled_elementwise, "compiled", lambda function: function)


def test_gradients_pass_gradcheck_in_float64(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # keeps float64
    torch.manual_seed(0)
    x, gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(7, dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda x: FusedNorm.apply(x, weight, 1e-6), x)
    assert torch.autograd.gradcheck(FusedSwiglu.apply, (gate, up))


@pytest.mark.parametrize("num_rotated", [6, 4])
def test_rotation_passes_gradcheck_with_and_without_features_that_stay(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, num_rotated: int
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # keeps float64
    torch.manual_seed(0)
    query, key = (torch.randn(1, heads, 5, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 5, num_rotated, dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda query, key: FusedRotate.apply(query, key, cos, sin), (query, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_family_with_the_same_rotation_gets_the_compiled_one(
    uncompiled: None, load: Callable[..., BaseModel], dtype: torch.dtype
) -> None:
    interleaved = CohereForCausalLM(
        CohereConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )

    assert len(faster_rotations(load("llama").model, FusedRotate)) == 2
    assert faster_rotations(interleaved.to(dtype), FusedRotate) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_and_gated_mlps_are_replaced_with_the_results_of_the_library(
    uncompiled: None, load: Callable[..., BaseModel], dtype: str
) -> None:
    base = load("llama", dtype)
    ids, choice = torch.arange(48)[None], Kernels(elementwise="compiled")
    expected = gradients(base, ids)

    attachment = Attachment(base.model, choice)
    outside = gradients(base, ids)
    with running(bare_pack([whole(ids)], device="cpu"), choice):
        found = gradients(base, ids)
    replaced = [type(module).__name__ for module, _ in fused_parts(base.model)]
    attachment.detach()

    assert sorted(replaced) == ["LlamaMLP"] * 2 + ["LlamaRMSNorm"] * 5
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert float((found - expected).norm() / expected.norm()) < tolerance
    assert not torch.equal(found, outside)
    assert torch.equal(gradients(base, ids), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replaced_modules_compute_the_original_outside_a_pack(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, load: Callable[..., BaseModel], dtype: str
) -> None:
    def requested(_function: Callable[..., Any]) -> None:
        raise AssertionError("a kernel was requested outside a pack")

    base = load("llama", dtype)
    parts = [(module, type(module).forward) for module, _ in fused_parts(base.model)]
    inputs = [torch.randn(1, 9, 64, dtype=base.dtype) for _ in parts]
    expected = [forward(module, x) for (module, forward), x in zip(parts, inputs, strict=True)]

    attachment = Attachment(base.model, Kernels(elementwise="compiled"))
    monkeypatch.setattr(layer_compiled_elementwise, "compiled", requested)
    found = [module(x) for (module, _), x in zip(parts, inputs, strict=True)]
    attachment.detach()

    assert all(map(torch.equal, found, expected))


def whole(ids: torch.Tensor) -> SliceInput:
    """Return one sequence with an empty adapter."""
    adapter = FlatAdapter((), LoraConfig(rank=1, alpha=1), dtype=torch.float32, device="cpu")
    sequence = ids[0].numpy().astype(np.int32), np.zeros(ids.shape[1], np.uint8)
    return SliceInput(adapter=adapter, sequences=(sequence,), label_weight=0.0, dropout=None)


def gradients(base: BaseModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the sum of squared logits with respect to the embeddings."""
    embedded = base.model.get_input_embeddings()(ids).detach().requires_grad_()
    base.model(inputs_embeds=embedded).logits.float().square().sum().backward()
    assert embedded.grad is not None
    return embedded.grad


def test_module_that_computes_something_else_is_not_replaced(uncompiled: None, load: Callable[..., BaseModel]) -> None:
    base = load("llama")

    class OffsetRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)

    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.GELU()

    assert fused_parts(nn.ModuleList([OffsetRMSNorm(), Gelu()])) == []
    assert len(fused_parts(base.model)) == 7


@pytest.mark.parametrize("error", [RuntimeError("Cannot find a working triton installation\nmore"), OSError("no gcc")])
def test_machine_that_cannot_compile_logs_the_reason_and_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, load: Callable[..., BaseModel], error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(kernel_compiled_elementwise, "compiled", lambda function: fails)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(selection, "why_not", lambda device: why_not(torch.device("cpu")))

    chosen = choose_kernels(torch.device("cuda:0"), torch.bfloat16)

    assert chosen.elementwise == "eager"
    (reason,) = chosen.reasons
    assert str(error).partition("\n")[0] in reason
    assert "more" not in reason
    Attachment(load("llama").model, Kernels(reasons=chosen.reasons)).detach()
    assert reason in caplog.text


def test_machine_that_can_compile_does_so_and_a_cpu_is_never_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    requested: list[torch.device] = []
    monkeypatch.setattr(selection, "why_not", requested.append)

    assert choose_kernels(torch.device("cpu"), torch.bfloat16).elementwise == "eager"
    assert requested == []
    assert choose_kernels(torch.device("cuda:0"), torch.bfloat16) == Kernels(
        lora="grouped_mm", attention="varlen", elementwise="compiled"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from imports of torch's compiler
def test_torch_compiler_gives_the_same_for_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    for tokens in (16, 33):
        gate, up = torch.randn(2, tokens, 24)
        torch.testing.assert_close(kernel_compiled_elementwise.compiled(swiglu)(gate, up), swiglu(gate, up))
