"""Byte arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from catalog import memory
from catalog.linears import Adapted, Linear

SHAPES = {"q_proj": [[64, 32], 2], "v_proj": [[16, 32], 2]}


def test_an_adapter_has_rank_times_in_plus_out_numbers_per_target() -> None:
    adapted = [
        Adapted(linear=Linear(path="q_proj", out_features=64, in_features=32), rank=4),
        Adapted(linear=Linear(path="v_proj", out_features=16, in_features=32), rank=8),
    ]

    assert memory.adapter_parameters(adapted, use_dora=False) == 4 * 96 + 8 * 48
    assert memory.adapter_parameters(adapted, use_dora=True) == 4 * 96 + 8 * 48 + 64 + 16


def test_a_row_is_four_vectors_of_fp32() -> None:
    assert memory.row_bytes(1000) == 16_000


def test_a_job_that_keeps_its_best_weights_has_one_vector_more() -> None:
    assert memory.own_bytes({}, "float32", num_parameters=1000, dropout=0.0, keeps_best=True) == 20_000


@pytest.mark.parametrize(("precision", "width"), [("bfloat16", 2), ("float32", 4)])
def test_a_trainer_needs_its_base_and_one_tick(precision: str, width: int) -> None:
    description = {"num_parameters": 500, "linear_shapes": SHAPES, "vocab_size": 10}

    assert memory.base_bytes(description, precision) == 500 * width
    assert memory.activation_bytes_per_token(SHAPES, precision) == 32 * 4 * 2 * width
    logits = 2 * 4 * 256 * 10
    need = memory.trainer_bytes(description, precision, num_tokens=100)
    assert need == 500 * width + 100 * 32 * 4 * 2 * width + logits


def test_a_quantised_base_has_small_linears_and_all_else_in_its_dtype() -> None:
    description = {"num_parameters": 10_000, "linear_shapes": SHAPES, "vocab_size": 10}
    weights, tables = 2 * (64 * 32 + 16 * 32), 4 * (16 + 256 + 1)

    int8 = memory.base_bytes(description, "bfloat16", "int8")
    nf4 = memory.base_bytes(description, "float32", "nf4")

    assert int8 == weights + 4 * 2 * (64 + 16) + 2 * (10_000 - weights)
    scales = 2 * (32 + 4) + 2 * (8 + 4)  # a byte for 64 weights, four for 256 of those
    assert nf4 == weights // 2 + scales + 4 * tables + 4 * (10_000 - weights)


def test_a_large_quantised_matrix_has_the_bits_a_weight_that_its_kind_is_known_for() -> None:
    description = {"num_parameters": 4096 * 4096, "linear_shapes": {"q_proj": [[4096, 4096], 1]}}

    nf4 = memory.base_bytes(description, "bfloat16", "nf4") / 4096**2
    assert nf4 == pytest.approx(0.516, abs=0.001)  # pyright: ignore[reportUnknownMemberType]


def test_a_tick_on_a_quantised_base_restores_its_largest_linear() -> None:
    description = {"num_parameters": 10_000, "linear_shapes": SHAPES, "vocab_size": 10}
    plain = memory.tick_bytes(description, "bfloat16", num_tokens=10)

    assert memory.tick_bytes(description, "bfloat16", "nf4", num_tokens=10) == plain + 2 * 64 * 32
    need = memory.trainer_bytes(description, "bfloat16", "nf4", num_tokens=10)
    assert need == memory.base_bytes(description, "bfloat16", "nf4") + plain + 2 * 64 * 32


def test_a_job_with_dropout_keeps_a_byte_for_each_input_of_each_linear_and_token_of_its_slice() -> None:
    description = {"linear_shapes": SHAPES}

    assert memory.own_bytes(description, "float32", num_parameters=1000, dropout=0.0) == 16_000
    assert memory.own_bytes(description, "float32", num_parameters=1000, dropout=0.1) == 16_000 + 1024 * 32 * 4


def test_a_start_that_is_subtracted_stands_beside_the_weights_in_the_bases_precision() -> None:
    for precision, width in (("bfloat16", 2), ("float32", 4)):
        own = memory.own_bytes({}, "float32", num_parameters=1000, dropout=0.0, keeps_start_in=precision)
        assert own == 16_000 + 2 * width * 1000


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3 * 10**12, "3.0 TB")]
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    assert memory.readable(num_bytes) == text


def test_a_row_or_pair_longer_than_a_slice_brings_its_own_activations() -> None:
    description = {"linear_shapes": SHAPES}
    usual = memory.own_bytes(description, "bfloat16", num_parameters=1000, dropout=0.0, longest_example=1024)
    longer = memory.own_bytes(description, "bfloat16", num_parameters=1000, dropout=0.0, longest_example=1500)

    assert usual == memory.own_bytes(description, "bfloat16", num_parameters=1000, dropout=0.0)
    assert longer - usual == 476 * memory.activation_bytes_per_token(SHAPES, "bfloat16")
