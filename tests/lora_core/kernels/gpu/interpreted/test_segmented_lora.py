"""Tiled LoRA equals the loop over segments, and a job's bits do not depend on its packmates."""

from __future__ import annotations

import pytest

from tests.lora_core.kernels.gpu.packs import Member, computed

PACK = [
    Member(seed=10, num_tokens=7, rank=4),
    Member(seed=20, num_tokens=5, rank=8, dropout=0.1),
    Member(seed=30, num_tokens=70, rank=16),  # more than one tile
    Member(seed=40, num_tokens=9, rank=3, adapts=False),
    Member(seed=50, num_tokens=33, rank=24, dropout=0.5),
    Member(seed=60, num_tokens=11, rank=8, dora=True),
    Member(seed=70, num_tokens=66, rank=16, dropout=0.05),
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(16, 8), (12, 4), (24, 32), (20, 28), (40, 64), (36, 60), (72, 128), (100, 68)])
def test_segments_of_any_class_give_the_results_of_the_loop(ranks: tuple[int, int], dropout: float) -> None:
    """The class is the width of h, whether rows of B are aligned, and whether there is dropout."""
    lengths = (7, 73)
    pack = [Member(seed=r, num_tokens=n, rank=r, dropout=dropout) for n, r in zip(lengths, ranks, strict=True)]

    for found, expected in zip(computed("tiled", pack), computed("loop", pack), strict=True):
        assert found.error(expected) < 2e-6


@pytest.mark.parametrize("fused", [True, False])
def test_tiled_segments_give_the_output_and_gradients_of_the_loop(fused: bool) -> None:
    pack = [member for member in PACK if fused or not member.dora]

    tiled, loop = computed("tiled", pack, fused=fused), computed("loop", pack, fused=fused)

    for found, expected in zip(tiled, loop, strict=True):
        assert found.error(expected) < 1e-6


def test_packed_jobs_have_the_bits_of_jobs_alone() -> None:
    packed = computed("tiled", PACK, with_base=False)

    alone = [computed("tiled", [member], with_base=False)[0] for member in PACK]

    assert [found.equals(expected) for found, expected in zip(packed, alone, strict=True)] == [True] * len(PACK)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy computes in the interpreter
@pytest.mark.parametrize("ruined", [1, 2])
def test_packmate_of_nan_and_infinity_changes_no_bit_of_others(ruined: int) -> None:
    pack = PACK[:3] + PACK[-1:]
    healthy = computed("tiled", pack)

    found = computed("tiled", pack, ruined=ruined)

    assert bool(found[ruined].gradient_N.isnan().any())
    others = [index for index in range(len(pack)) if index != ruined]
    assert all(found[index].equals(healthy[index]) for index in others)
