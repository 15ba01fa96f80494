"""Attention in tiles equals eager attention and the strips, and a sequence's bits do not depend on its packmates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.kernels.gpu import attention
from lora_core.kernels.gpu.comparison import attended
from lora_core.kernels.gpu.visible_keys import VisibleKeys
from lora_core.kernels.selection import Kernels
from lora_core.layers.attention.dense_cpu import UNLIMITED as ALL
from lora_core.layers.attention.packed import packed_attention
from lora_core.packing.packed_batch import running
from tests.lora_core.layers.attention.test_flash import pack_of

H, K = 4, 2
LENGTHS = (5, 1, 90, 32)
"""128 tokens in all: no padding. One sequence has several tiles."""


def numbers(size: int) -> list[Tensor]:
    """Return q, k, v and dy, [heads, T, E], as views of rows by token."""
    generator = torch.Generator().manual_seed(size)
    T = sum(LENGTHS)
    return [torch.randn(T, heads, size, generator=generator).transpose(0, 1) for heads in (H, K, K, H)]


def computed(inputs: Sequence[Tensor], lengths: Sequence[int], visible: VisibleKeys) -> list[Tensor]:
    """Return y and the gradients of q, k and v, all [T, heads, E]."""
    *heads, dy = inputs
    bounds_S, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
    y_THE, logs_HT = attention.attend(heads, bounds_S, longest, visible)
    dy_THE = dy.transpose(0, 1).contiguous()
    return [y_THE, *attention.attend_backward(dy_THE, heads, y_THE, logs_HT, bounds_S, longest, visible)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize(
    "visible",
    [
        VisibleKeys(scale=0.4, softcap=3.0, before=ALL, after=0),
        VisibleKeys(scale=0.4, softcap=50.0, before=39, after=0),
        VisibleKeys(scale=0.4, softcap=0.0, before=ALL, after=0),
        VisibleKeys(scale=0.4, softcap=0.0, before=7, after=7),
    ],
    ids=["capped", "capped with a window", "causal", "both sides"],
)
def test_tiles_equal_eager_attention_in_float64(size: int, visible: VisibleKeys) -> None:
    inputs = numbers(size)
    leaves = [part.double().requires_grad_() for part in inputs[:3]]
    sequences = zip(*(leaf.split(LENGTHS, dim=1) for leaf in leaves), strict=True)
    expected_THE = torch.cat([attended(q, k, v, visible) for q, k, v in sequences])
    gradients = torch.autograd.grad(expected_THE, leaves, inputs[3].transpose(0, 1).double())

    found = computed(inputs, LENGTHS, visible)

    for tensor, expected in zip(found, [expected_THE, *(part.transpose(0, 1) for part in gradients)], strict=True):
        assert error(tensor, expected.detach()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0}, {"softcap": 5.0, "sliding_window": 20}, {"is_causal": False}],
    ids=["capped", "capped with a window", "both sides"],
)
def test_packed_attention_in_tiles_equals_the_strips(options: dict[str, Any]) -> None:
    T, results = sum(LENGTHS), []
    for kernels in (Kernels(), Kernels(tiled_head_size=16)):
        query, key, value = leaves = [part[None].clone().requires_grad_() for part in numbers(16)[:3]]
        with running(pack_of(LENGTHS), kernels):
            output, _ = packed_attention(nn.Module(), query, key, value, None, scaling=0.3, **options)
        output.square().sum().backward()
        assert output.shape == (1, T, H, 16)
        results.append([output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])

    for found, expected in zip(results[1], results[0], strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_packed_sequences_have_the_bits_of_sequences_alone(softcap: float) -> None:
    visible = VisibleKeys(scale=0.4, softcap=softcap, before=39, after=0)
    inputs = numbers(16)

    packed, start = computed(inputs, LENGTHS, visible), 0

    for length in LENGTHS:
        rows = slice(start, start + length)
        start += length
        alone = computed([part[:, rows] for part in inputs], [length], visible)
        assert all(torch.equal(found[rows], own) for found, own in zip(packed, alone, strict=True))


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # NumPy computes in the interpreter
def test_sequence_of_nan_and_infinity_changes_no_bit_of_others() -> None:
    visible = VisibleKeys(scale=0.4, softcap=3.0, before=ALL, after=0)
    inputs, ruined = numbers(16), slice(6, 96)
    healthy = computed(inputs, LENGTHS, visible)
    for part, number in zip(inputs, (torch.nan, torch.inf, torch.nan, torch.inf), strict=True):
        part[:, ruined] = number

    found = computed(inputs, LENGTHS, visible)

    assert all(bool(part[ruined].isnan().any()) for part in found)
    for rows in (slice(0, 6), slice(96, None)):
        assert all(torch.equal(part[rows], other[rows]) for part, other in zip(found, healthy, strict=True))
