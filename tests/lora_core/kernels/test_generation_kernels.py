"""The kernels of generation compute what the general code computes, and each row alone."""

from typing import Any

import pytest
import torch

from lora_core.adapter.flat_adapter import MagnitudeViews, SiteViews
from lora_core.kernels.kv_cache import SequenceCache
from lora_core.layers.attention.cached import attend_last, attend_newest
from lora_core.layers.lora_linear import Piece, PlainWeight, add_lora

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-4},
}
LENGTHS = (1, 9, 40)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(
    key_heads: int, sizes: tuple[int, int], dtype: torch.dtype, *, stored: torch.dtype | None = None
) -> list[SequenceCache]:
    """Return caches of LENGTHS tokens with numbers of `dtype`, in the dtype `stored`."""
    caches = []
    for number, length in enumerate(LENGTHS):
        kept = SequenceCache(max_tokens=64)
        kept.extended(
            random(key_heads, length, sizes[0], seed=number, dtype=dtype).to(stored or dtype),
            random(key_heads, length, sizes[1], seed=10 + number, dtype=dtype).to(stored or dtype),
        )
        kept.num_tokens = length
        kept.begin_pass()
        caches.append(kept)
    return caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("heads", "sizes"), [((6, 2), (8, 8)), ((3, 3), (16, 12)), ((4, 1), (64, 64))])
def test_attention_to_a_cache_equals_the_reference(dtype, window, softcap, heads, sizes):
    options: dict[str, Any] = {"scale": 0.6, "window": window, "softcap": softcap}
    query = random(heads[0], len(LENGTHS), sizes[0], seed=20, dtype=dtype)
    key = random(heads[1], len(LENGTHS), sizes[0], seed=21, dtype=dtype)
    value = random(heads[1], len(LENGTHS), sizes[1], seed=22, dtype=dtype)
    reference = filled(heads[1], sizes, dtype, stored=torch.float32)
    q, k, v = query.float(), key.float(), value.float()  # in bfloat16 the reference rounds its weights
    expected = [
        attend_last(q[:, n : n + 1], *kept.extended(k[:, n : n + 1], v[:, n : n + 1]), **options)
        for n, kept in enumerate(reference)
    ]
    caches = filled(heads[1], sizes, dtype)

    found = attend_newest(query, key, value, caches, **options)

    torch.testing.assert_close(found.float(), torch.cat(expected, dim=1).transpose(0, 1), **TOLERANCE[dtype])
    for own, other in zip(caches, reference, strict=True):  # the new keys and values are in the cache
        own.num_tokens, other.num_tokens = own.num_tokens + 1, other.num_tokens + 1
        for kept in (own, other):
            kept.begin_pass()
        one, another = own.extended(key[:, :1], value[:, :1]), other.extended(k[:, :1], v[:, :1])
        torch.testing.assert_close([part.float() for part in one], list(another), rtol=0, atol=0)


def test_attention_of_a_sequence_has_the_same_bits_alone():
    query, key, value = (random(heads, len(LENGTHS), 16, seed=heads) for heads in (4, 2, 2))
    options: dict[str, Any] = {"scale": 0.25, "window": None, "softcap": None}
    together = attend_newest(query, key, value, filled(2, (16, 16), torch.float32), **options)

    for n, kept in enumerate(filled(2, (16, 16), torch.float32)):
        q, k, v = (part[:, n : n + 1] for part in (query, key, value))
        (alone,) = attend_newest(q, k, v, [kept], **options)
        assert torch.equal(alone, together[n])


def views_of(rank: int, features: int, outputs: int, dtype: torch.dtype, *, with_magnitude: bool = False) -> SiteViews:
    a_RD, b_OR = random(rank, features, seed=1, dtype=dtype), random(outputs, rank, seed=2, dtype=dtype)
    magnitude = None
    if with_magnitude:
        factors = 1 + 0.3 * random(outputs, seed=3)
        magnitude = MagnitudeViews(m_O=factors, grad_O=factors, norm_O=factors, factor_O=factors)
    return SiteViews(a_RD=a_RD, b_OR=b_OR, grad_a_RD=a_RD, grad_b_OR=b_OR, scale=0.3, magnitude=magnitude)


def with_lora(
    y_TO: torch.Tensor, x_TD: torch.Tensor, views: SiteViews, bias_O: torch.Tensor | None, *, is_by_row: bool
) -> torch.Tensor:
    piece = Piece(start=0, stop=len(x_TD), views=views, module="linear", dropout=None, is_by_row=is_by_row)
    added = y_TO.clone()
    weight = PlainWeight(weight_OD=torch.zeros(y_TO.shape[1], x_TD.shape[1], dtype=x_TD.dtype), bias_O=bias_O)
    branches = add_lora(added, x_TD, (piece,), weight)
    assert len(branches) == (0 if is_by_row else 1)
    return added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize("with_magnitude", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lora_by_row_equals_lora_by_matmul_and_each_row_alone(dtype, rank, with_magnitude, with_bias):
    views = views_of(rank, 40, 24, dtype, with_magnitude=with_magnitude)
    x_TD, y_TO = random(5, 40, seed=4, dtype=dtype), random(5, 24, seed=5, dtype=dtype)
    bias_O = random(24, seed=6, dtype=dtype) if with_bias else None

    found = with_lora(y_TO, x_TD, views, bias_O, is_by_row=True)

    bias = None if bias_O is None else bias_O.float()
    expected = with_lora(y_TO.float(), x_TD.float(), views_in_float(views), bias, is_by_row=False)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    for row in range(5):
        alone = with_lora(y_TO[row : row + 1], x_TD[row : row + 1], views, bias_O, is_by_row=True)
        assert torch.equal(alone[0], found[row])


def views_in_float(views: SiteViews) -> SiteViews:
    a_RD, b_OR = views.a_RD.float(), views.b_OR.float()
    return SiteViews(a_RD=a_RD, b_OR=b_OR, grad_a_RD=a_RD, grad_b_OR=b_OR, scale=views.scale, magnitude=views.magnitude)
