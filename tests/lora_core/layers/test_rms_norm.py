"""The norm kernel gives the library's values and autograd's gradients, and replaces only norms that agree."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_core.layers.rms_norm import RmsNorm, faster_norms, same_numbers


def norm_of(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm = kind(64, eps=1e-5).to(dtype).requires_grad_(False)
    norm.load_state_dict({"weight": torch.linspace(-0.5, 2, 64)})
    return norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_norm_gives_the_values_and_gradient_of_the_library(dtype: torch.dtype, tolerance: float):
    norm = norm_of(LlamaRMSNorm, dtype)
    x, dy = (torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    y, expected = RmsNorm.apply(ours, norm.weight, 1e-5), norm(theirs)
    y.backward(dy)
    expected.backward(dy)

    assert same_numbers(expected, y)
    assert torch.equal(ours, theirs), "the input must not change"
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_norms_that_compute_the_same_values_are_replaced(dtype: torch.dtype):
    plain, shifted = norm_of(LlamaRMSNorm, dtype), norm_of(GemmaRMSNorm, dtype)
    model = nn.ModuleList([plain, shifted, nn.LayerNorm(64, dtype=dtype), nn.Linear(64, 64, dtype=dtype)])

    assert [norm for norm, _ in faster_norms(model)] == [plain]
