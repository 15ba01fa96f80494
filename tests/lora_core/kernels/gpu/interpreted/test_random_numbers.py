"""The kernels draw the numbers of the host, and LoRA with such masks gives the same bits, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.kernels.gpu.random_numbers import COLUMNS, ROWS, WORDS, draw_mask, draw_within
from lora_core.packing.packed_batch import DropoutKey
from lora_core.runtime.counter_rng import philox_key, uniform_within
from tests.lora_core.kernels.gpu.packs import Member, computed

PACK = [
    Member(seed=10, num_tokens=5, rank=8, dropout=0.1),
    Member(seed=20, num_tokens=33, rank=4, dropout=0.5, dora=True),
    Member(seed=30, num_tokens=7, rank=3, dora=True),
    Member(seed=40, num_tokens=70, rank=130, dropout=0.9),
]
KEYS = [(0, 0), (1, 16), (2**31, 2**32), (2**63, 2**64 - 1), (2**63 - 1, 2**63 + 16)]


def drawn(key: DropoutKey, module: str, like_TD: Tensor) -> Tensor:
    """Return the mask as a GPU draws it."""
    return draw_mask(key.philox_keys([module])[0], key.threshold, like_TD)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (64, 64), (65, 64), (130, 101), (2, ROWS * COLUMNS + 1)])
def test_mask_equals_that_of_the_host(shape: tuple[int, int], probability: float) -> None:
    like_TD = torch.empty(shape)
    for seed in range(4):
        key = DropoutKey(probability=probability, seed=seed, step=2**40, slice_index=3)

        assert torch.equal(drawn(key, "layers.0.down_proj", like_TD), key.keep_TD("layers.0.down_proj", like_TD))


@pytest.mark.parametrize("key", KEYS)
def test_any_words_are_a_key(key: tuple[int, int]) -> None:
    words = np.array(key, np.uint64)
    numbers = np.asarray(np.random.Philox(key=words).random_raw(80), np.uint64)

    mask = draw_mask(words, 30_000, torch.empty(320))
    within = draw_within(words, torch.ones(5, dtype=torch.float64), 16)

    assert mask.tolist() == (numbers.view(np.uint16) < 30_000).tolist()
    assert within.flatten().tolist() == ((numbers >> 11).astype(np.float64) * 2.0**-52 - 1).astype(np.float32).tolist()


def test_nothing_to_draw_needs_no_launch() -> None:
    assert draw_mask(np.array([1, 2], np.uint64), 30_000, torch.empty(0, 8)).shape == (0, 8)
    assert draw_within(np.array([1, 2], np.uint64), torch.empty(0, dtype=torch.float64), 8).shape == (0, 8)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (16, 576), (8, 1536), (130, 101), (2, WORDS + 1), (64, 4096)])
def test_uniform_numbers_equal_those_of_the_host(shape: tuple[int, int]) -> None:
    bounds_M = np.geomspace(1e-4, 70, shape[0])
    for seed in range(2):
        key = ("lora_A", seed, "layers.0.down_proj")

        found = draw_within(philox_key(*key), torch.from_numpy(bounds_M), shape[1])

        expected = uniform_within(*key, bounds=bounds_M, num_columns=shape[1])
        assert found.dtype == torch.float32
        assert found.numpy().tobytes() == expected.tobytes()


def test_lora_by_segment_gives_the_same_bits_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    by_host = computed("loop", PACK)
    num_drawn = 0

    def counted(key: DropoutKey, module: str, like_TD: Tensor) -> Tensor:
        nonlocal num_drawn
        num_drawn += 1
        return drawn(key, module, like_TD)

    monkeypatch.setattr(DropoutKey, "keep_TD", counted)

    by_kernel = computed("loop", PACK)

    assert num_drawn == 3
    assert all(found.equals(expected) for found, expected in zip(by_kernel, by_host, strict=True))
