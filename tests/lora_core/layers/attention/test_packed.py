"""Packed attention equals transformers' own, sequence by sequence, for every option that models pass."""

import pytest
import torch
from torch import Tensor, nn

from lora_core.layers.attention import packed
from lora_core.layers.attention.packed import attend, packed_attention

H, K, E = 4, 2, 8


def textbook(q: Tensor, k: Tensor, v: Tensor, *, scale, causal, window, softcap) -> Tensor:
    """Attention written out in float64, one query at a time."""
    outputs = torch.zeros_like(q, dtype=torch.float64)
    for head in range(H):
        keys, values = k[head // (H // K)].double(), v[head // (H // K)].double()
        for i in range(q.shape[1]):
            first = max(0, i - window + 1) if window else 0
            last = i + 1 if causal else q.shape[1]
            scores = scale * keys[first:last] @ q[head, i].double()
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            outputs[head, i] = torch.softmax(scores, 0) @ values[first:last]
    return outputs


@pytest.mark.parametrize("longest_matrix", [1024, 0], ids=["matrix", "fused or query chunks"])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": None, "softcap": None},
        {"causal": True, "window": 5, "softcap": None},
        {"causal": True, "window": 99, "softcap": None},
        {"causal": True, "window": None, "softcap": 3.0},
        {"causal": False, "window": None, "softcap": None},
    ],
)
def test_one_sequence_equals_the_textbook(monkeypatch, options, longest_matrix):
    monkeypatch.setattr(packed, "LONGEST_MATRIX", longest_matrix)
    torch.manual_seed(0)
    q, k, v = torch.randn(H, 13, E), torch.randn(K, 13, E), torch.randn(K, 13, E)

    output = attend(q, k, v, scale=0.3, **options)

    expected = textbook(q, k, v, scale=0.3, **options)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_pass_gradcheck_in_float64(window, softcap):
    torch.manual_seed(0)
    inputs = [torch.randn(heads, 7, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    options = {"scale": 0.5, "causal": True, "window": window, "softcap": softcap}
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, **options), inputs)


def test_outside_a_pack_the_batch_is_one_sequence():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, H, 9, E), torch.randn(1, K, 9, E), torch.randn(1, K, 9, E)

    output, _ = packed_attention(nn.Module(), q, k, v, None, scaling=0.3, is_causal=True)

    expected = textbook(q[0], k[0], v[0], scale=0.3, causal=True, window=None, softcap=None)
    torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, rtol=1e-5, atol=1e-5)
