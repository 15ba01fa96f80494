"""Kernels for gated MLPs and residual blocks give the library's values and gradients, and replace only what agrees."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, Olmo2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

from lora_core.layers import residual_block, swiglu
from lora_core.layers.residual_block import faster_blocks
from lora_core.layers.rms_norm import faster_norms, same_numbers
from lora_core.layers.swiglu import faster_mlps

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
}
WIDE: dict[str, Any] = SIZES | {"intermediate_size": 1536}
LARGE: dict[str, Any] = SIZES | {"intermediate_size": 28_672}
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])


def drawn(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mlp_of(dtype: torch.dtype, activation: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(**SIZES, hidden_act=activation)).to(dtype).requires_grad_(False)


def block_of(kind: type[nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    block = kind(config, layer_idx=0).to(dtype).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.linspace(-0.5, 2, parameter.numel()))
    return block


@DTYPES
def test_gated_mlp_gives_the_values_and_gradients_of_the_library(dtype: torch.dtype, tolerance: float):
    mlp, dy = mlp_of(dtype), drawn(2, dtype)
    ours, theirs = (drawn(1, dtype).requires_grad_() for _ in range(2))

    y, expected = swiglu._forward(mlp, ours), mlp(theirs)
    y.backward(dy)
    expected.backward(dy)

    assert same_numbers(expected, y)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_only_silu_gates_are_replaced():
    gated, other = mlp_of(torch.float32), mlp_of(torch.float32, "gelu")

    assert [module for module, _ in faster_mlps(nn.ModuleList([gated, other]))] == [gated]
    assert faster_mlps(other) == []


class NearlyLlamaMLP(LlamaMLP):
    """The gate is off by one percent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x) * 1.01) * self.up_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1, 1e3])
def test_mlp_is_replaced_at_any_magnitude_of_its_values(dtype: torch.dtype, size: float):
    torch.manual_seed(0)
    config = LlamaConfig(**WIDE)
    right, wrong = (kind(config).to(dtype).requires_grad_(False) for kind in (LlamaMLP, NearlyLlamaMLP))
    for mlp in (right, wrong):
        mlp.down_proj.weight.mul_(size / mlp(drawn(1, dtype)).abs().max())

    assert [module for module, _ in faster_mlps(nn.ModuleList([right, wrong]))] == [right]


def nearly_activated(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """Return the activation with errors of up to 16 units in the last place of fp32, such as of a fast exp."""
    wide_TF = torch.nn.functional.silu(gate_TF.float())
    errors_TF = torch.arange(wide_TF.numel()).remainder(33).sub(16).view(wide_TF.shape) * 2.0**-23
    return (wide_TF * (1 + errors_TF)).to(gate_TF.dtype) * up_TF


def test_mlp_of_a_large_base_is_replaced_in_spite_of_errors_in_the_last_place_of_fp32(monkeypatch: pytest.MonkeyPatch):
    """A few activations are rounded to another bf16 number, and each changes a row of the output."""
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(**LARGE)).to(torch.bfloat16).requires_grad_(False)
    monkeypatch.setattr(swiglu, "_activated", nearly_activated)

    assert [module for module, _ in faster_mlps(mlp)] == [mlp]


def test_mlp_is_not_replaced_if_its_activation_has_errors_of_bfloat16(monkeypatch: pytest.MonkeyPatch):
    mlp = mlp_of(torch.bfloat16)
    monkeypatch.setattr(swiglu, "_activated", lambda gate, up: torch.nn.functional.silu(gate) * up * 1.01)

    assert faster_mlps(mlp) == []


def test_values_are_compared_relative_to_their_row():
    theirs = torch.tensor([[900.0, -700.0, 0.001], [0.5, 0.25, -0.001]])
    rounded, wrong = theirs.clone(), theirs.clone()
    rounded[0, 2] += 1e-4
    wrong[1, 2] += 1e-4

    assert same_numbers(theirs, rounded)
    assert not same_numbers(theirs, wrong)


def test_one_mlp_of_each_kind_is_checked(monkeypatch):
    checked: list[nn.Module] = []
    monkeypatch.setattr(swiglu, "_agrees", lambda module: checked.append(module) or module is not wide)
    first, second, half = mlp_of(torch.float32), mlp_of(torch.float32), mlp_of(torch.bfloat16)
    wide = LlamaMLP(LlamaConfig(**WIDE))

    found = faster_mlps(nn.ModuleList([first, second, half, wide]))

    assert checked == [first, half, wide]
    assert [module for module, _ in found] == [first, second, half]


@DTYPES
def test_block_gives_the_values_and_gradients_of_the_library(dtype: torch.dtype, tolerance: float):
    block, dy = block_of(LlamaDecoderLayer, LlamaConfig(**SIZES), dtype), drawn(2, dtype)
    angles = torch.randn(1, 48, 32).to(dtype)
    options: dict[str, Any] = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    ours, theirs = (drawn(1, dtype).requires_grad_() for _ in range(2))

    y, expected = residual_block._forward(block, ours, **options), block(theirs, **options)
    y.backward(dy)
    expected.backward(dy)

    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "config", "is_replaced"),
    [
        (LlamaDecoderLayer, LlamaConfig(**SIZES), True),
        (GraniteDecoderLayer, GraniteConfig(**SIZES, residual_multiplier=0.5), False),
        (Olmo2DecoderLayer, Olmo2Config(**SIZES), False),
        (Gemma2DecoderLayer, Gemma2Config(**SIZES), False),
    ],
    ids=["llama", "scaled sums", "norms after sublayers", "four norms"],
)
def test_only_blocks_with_the_same_residual_sums_are_replaced(dtype: torch.dtype, kind, config, is_replaced: bool):
    model = nn.ModuleList([block_of(kind, config, dtype)])

    found = faster_blocks(model, [norm for norm, _ in faster_norms(model)])

    assert [module for module, _ in found] == (list(model) if is_replaced else [])
    assert "forward" not in vars(model[0].self_attn)
    assert "forward" not in vars(model[0].mlp)
