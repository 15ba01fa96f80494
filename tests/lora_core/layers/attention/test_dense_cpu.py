"""Attention by compiled kernels has the values and gradients of torch, for each sequence."""

import pytest
import torch
from torch import Tensor

from lora_core.layers.attention import dense_cpu
from lora_core.layers.attention.dense_cpu import UNLIMITED, Visibility, attend_by_matrices

SIGHTS = {"causal": (True, None), "window": (True, 5), "wide window": (True, 99), "both ways": (False, None)}
SIGHTS |= {"window both ways": (False, 3)}
HEADS = {"grouped": (6, 2), "equal": (3, 3), "one key head": (4, 1)}
LENGTHS = {
    "one": (1,),
    "two": (2,),
    "odd": (15,),
    "past a vector": (17,),
    "many": (1, 33, 2, 16, 12),
    "long": (70, 150),
}


def plain(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """[H, T, E] and [K, T, E] to [T, H, E], one sequence at a time, in the textbook form."""
    outputs = []
    parts = (tensor.split(visibility.lengths, dim=1) for tensor in (q, k, v))
    for q_part, k_part, v_part in zip(*parts, strict=True):
        groups = len(q) // len(k)
        scores = visibility.scale * q_part @ k_part.repeat_interleave(groups, 0).transpose(1, 2)
        position = torch.arange(q_part.shape[1])
        distance = position[:, None] - position
        hidden = (distance.abs() >= visibility.window) | (distance < (0 if visibility.causal else -len(position)))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append((weights @ v_part.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(outputs)


def inputs(heads: str, num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return views of projections, token by token, as a model passes them, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    num_heads, num_key_heads = HEADS[heads]
    rows = [
        torch.randn(num_tokens, count, size, generator=generator).to(dtype)
        for count, size in ((num_heads, 8), (num_key_heads, 8), (num_key_heads, 12), (num_heads, 12))
    ]
    return [*(row.transpose(0, 1).requires_grad_() for row in rows[:3]), rows[3]]


def with_gradients(attend, tensors: list[Tensor], visibility: Visibility) -> list[Tensor]:
    *heads, received = tensors
    output = attend(*heads, visibility)
    return [output.detach(), *torch.autograd.grad(output, heads, received)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sees", SIGHTS)
def test_values_and_gradients_equal_those_of_torch(sees, lengths, heads):
    causal, window = SIGHTS[sees]
    visibility = Visibility(lengths=LENGTHS[lengths], scale=0.4, causal=causal, window=window or UNLIMITED)
    tensors = inputs(heads, sum(visibility.lengths))

    found = with_gradients(attend_by_matrices, tensors, visibility)

    for ours, theirs in zip(found, with_gradients(plain, tensors, visibility), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("sees", SIGHTS)
def test_bfloat16_differs_only_by_rounding(sees):
    causal, window = SIGHTS[sees]
    visibility = Visibility(lengths=(17, 70), scale=0.4, causal=causal, window=window or UNLIMITED)
    tensors = inputs("grouped", 87, torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]

    found = with_gradients(attend_by_matrices, tensors, visibility)

    for ours, exact in zip(found, with_gradients(plain, wide, visibility), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - exact).norm() / exact.norm()) < 0.006  # half a unit in the last place is 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_packmates(dtype):
    lengths = (19, 1, 40, 15)
    tensors = inputs("grouped", sum(lengths), dtype)
    together = with_gradients(attend_by_matrices, tensors, Visibility(lengths=lengths, scale=0.4, causal=True))

    for start, length in ((0, 19), (19, 1), (20, 40), (60, 15)):
        mine = [tensor[:, start : start + length].detach().requires_grad_() for tensor in tensors[:3]]
        received = tensors[3][start : start + length]
        alone = with_gradients(
            attend_by_matrices, [*mine, received], Visibility(lengths=(length,), scale=0.4, causal=True)
        )

        assert torch.equal(alone[0], together[0][start : start + length])
        for one, other in zip(alone[1:], together[1:], strict=True):
            assert torch.equal(one, other[:, start : start + length])


def test_heads_can_be_parts_of_one_projection():
    """Queries, keys and values can be outputs of one matrix, and rotated heads can be contiguous."""
    visibility = Visibility(lengths=(20, 9), scale=0.4, causal=True)
    fused = torch.randn(29, 10, 8, generator=torch.Generator().manual_seed(2))
    q, k, v = (part.transpose(0, 1) for part in fused.split((6, 2, 2), dim=1))

    output = attend_by_matrices(q, k.contiguous(), v, visibility)

    torch.testing.assert_close(output, plain(q, k, v, visibility), rtol=2e-5, atol=2e-6)


def test_later_token_is_not_seen_even_if_it_is_nan():
    q, k, v = inputs("grouped", 20)[:3]
    visibility = Visibility(lengths=(20,), scale=0.4, causal=True)
    expected = attend_by_matrices(q, k, v, visibility)
    with torch.no_grad():
        k[:, 12] = float("nan")

    output = attend_by_matrices(q, k, v, visibility)

    assert torch.equal(output[:12], expected[:12])
    assert output[12:].isnan().all()


def test_distant_scores_give_weights_of_one_and_zero():
    q, k = torch.full((1, 3, 8), 30.0), torch.zeros(1, 3, 8)
    k[:, 1] = 30.0
    v = torch.arange(3.0).view(1, 3, 1).expand(1, 3, 8)

    output = attend_by_matrices(q, k, v, Visibility(lengths=(3,), scale=1.0, causal=True))

    assert output[:, 0, 0].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_long_sequences_are_recomputed_with_the_same_bits(dtype, monkeypatch):
    visibility = Visibility(lengths=(7, 300, 40), scale=0.4, causal=True)
    tensors = inputs("grouped", 347, dtype)

    recomputed, kept_bytes = with_saved_bytes(tensors, visibility)
    monkeypatch.setattr(dense_cpu, "LONGEST_KEPT", 1 << 20)
    kept, all_bytes = with_saved_bytes(tensors, visibility)

    assert all(torch.equal(one, other) for one, other in zip(recomputed, kept, strict=True))
    assert all_bytes - kept_bytes == 6 * 300 * 304 * dtype.itemsize


def with_saved_bytes(tensors: list[Tensor], visibility: Visibility) -> tuple[list[Tensor], int]:
    """Return output and gradients, and the bytes saved between forward and backward."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = with_gradients(attend_by_matrices, tensors, visibility)
    return found, sum(kept)
