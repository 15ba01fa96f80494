"""Byte arithmetic, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.resources import memory
from catalog.spec.target_modules import Adapted, Linear

SHAPES = {"q_proj": [[64, 32], 2], "v_proj": [[16, 32], 2]}


def test_an_adapter_has_rank_times_in_plus_out_numbers_per_target() -> None:
    adapted = [
        Adapted(linear=Linear(path="q_proj", out_features=64, in_features=32), rank=4),
        Adapted(linear=Linear(path="v_proj", out_features=16, in_features=32), rank=8),
    ]

    assert memory.adapter_parameters(adapted, use_dora=False) == 4 * 96 + 8 * 48
    assert memory.adapter_parameters(adapted, use_dora=True) == 4 * 96 + 8 * 48 + 64 + 16


def own_bytes(
    description: dict[str, Any], precision: str = "float32", *, longest_example: int | None = 1, **options: Any
) -> int:
    """Of 1,000 parameters, and steps of one slice."""
    given: dict[str, Any] = {"dropout": 0.0, "longest_example": longest_example, **options}
    return sum(memory.own_parts(description, precision, num_parameters=1000, **given).values())


def test_a_row_is_four_vectors_of_fp32_and_one_more_in_the_dtype_of_a_base_that_is_not() -> None:
    assert memory.row_bytes(1000, "float32") == 16_000
    assert memory.row_bytes(1000, "bfloat16") == 18_000


def test_a_job_that_keeps_its_best_weights_has_one_vector_more() -> None:
    assert own_bytes({}, keeps_best=True) == 20_000


def test_a_step_that_may_have_two_slices_has_a_gradient_more() -> None:
    assert own_bytes({}, batch_size=4, longest_example=128) == 16_000
    assert own_bytes({}, batch_size=4, longest_example=129) == 24_000
    assert own_bytes({}, longest_example=None) == 24_000, "lengths are not known yet"


def test_a_start_and_the_answers_take_their_own_only_where_that_is_more_than_a_slice() -> None:
    few, many = {"prompts": ["a" * 100], "max_tokens": 28}, {"prompts": ["a" * 2000] * 8, "max_tokens": 128}
    tall = {"linear_shapes": {"q_proj": [[8192, 64], 1]}}
    plain = own_bytes({"linear_shapes": SHAPES}, "bfloat16")

    assert own_bytes({"linear_shapes": SHAPES}, "bfloat16", samples=few) == plain
    slice_bytes = memory.slice_bytes({"linear_shapes": SHAPES}, "bfloat16")
    answers = 8 * 2128 * 64 * 6 * 2
    assert own_bytes({"linear_shapes": SHAPES}, "bfloat16", samples=many) == plain + answers - slice_bytes
    sized = {"linear_shapes": SHAPES, "hidden_size": 64, "num_layers": 3}
    keys = 8 * 2128 * 2 * 3 * 64 * 2
    assert own_bytes(sized, "bfloat16", samples=many) == plain + answers + keys - slice_bytes
    grouped = sized | {"linear_shapes": SHAPES | {"k_proj": [[16, 64], 3]}}
    fewer = own_bytes(grouped, "bfloat16", samples=many) - own_bytes(grouped, "bfloat16")
    assert fewer == answers + keys // 4 - memory.slice_bytes(grouped, "bfloat16")
    start = 4 * (3 * 8192 * 64 + 64 * 64)
    begun = own_bytes(tall, "bfloat16", init_lora_weights="pissa")
    assert begun == own_bytes(tall, "bfloat16") + 4 * 1000 + start - memory.slice_bytes(tall, "bfloat16")


def test_a_long_row_keeps_what_enters_the_blocks_and_one_of_them_where_blocks_are_computed_again() -> None:
    description = {"linear_shapes": {"q_proj": [[64, 64], 4]}, "hidden_size": 64, "num_layers": 4}
    a_token, recomputed = 4 * 64 * 2 * 2, 4 * 64 * 2 + 64 * 2 * 2
    counted = {
        (length, recomputes): own_bytes(description, "bfloat16", longest_example=length, recomputes=recomputes)
        for length in (1024, 1100, 8192)
        for recomputes in (False, True)
    }

    row = counted[1024, False]
    assert counted[8192, False] == row + (8192 - 1024) * a_token
    assert counted[8192, True] == row + 8192 * recomputed - 1024 * a_token
    assert counted[1100, True] == counted[1024, True] == row, "a slice is counted whole on any device"
    with_dora = [
        own_bytes(description, "bfloat16", longest_example=8192, recomputes=True, use_dora=on) for on in (0, 1)
    ]
    assert with_dora[1] - with_dora[0] == 4 * 64 * (2 * 4 + 2 * 8192), "DoRA's products stay, and its norms"


@pytest.mark.parametrize(("precision", "width"), [("bfloat16", 2), ("float32", 4)])
def test_a_trainer_needs_its_base_and_one_tick(precision: str, width: int) -> None:
    description = {"num_parameters": 500, "linear_shapes": SHAPES, "vocab_size": 10}

    assert memory.base_bytes(description, precision) == 500 * width
    assert memory.activation_bytes_per_token(SHAPES, precision) == 32 * 4 * 2 * width
    logits = 2 * 4 * 256 * 10
    need = memory.trainer_bytes(description, precision, num_tokens=100)
    assert need == 500 * width + 100 * 32 * 4 * 2 * width + logits


def test_a_quantized_base_has_small_linears_and_all_else_in_its_dtype() -> None:
    description = {"num_parameters": 10_000, "linear_shapes": SHAPES, "vocab_size": 10}
    weights, tables = 2 * (64 * 32 + 16 * 32), 4 * (16 + 256 + 1)

    int8 = memory.base_bytes(description, "bfloat16", "int8")
    nf4 = memory.base_bytes(description, "float32", "nf4")

    assert int8 == weights + 4 * 2 * (64 + 16) + 2 * (10_000 - weights)
    scales = 2 * (32 + 4) + 2 * (8 + 4)  # a byte for 64 weights, four for 256 of those
    assert nf4 == weights // 2 + scales + 4 * tables + 4 * (10_000 - weights)


def test_a_large_quantized_matrix_has_the_bits_a_weight_that_its_kind_is_known_for() -> None:
    description = {"num_parameters": 4096 * 4096, "linear_shapes": {"q_proj": [[4096, 4096], 1]}}

    nf4 = memory.base_bytes(description, "bfloat16", "nf4") / 4096**2
    assert nf4 == pytest.approx(0.516, abs=0.001)  # pyright: ignore[reportUnknownMemberType]


def test_a_tick_on_a_quantized_base_restores_its_largest_linear() -> None:
    description = {"num_parameters": 10_000, "linear_shapes": SHAPES, "vocab_size": 10}
    plain = memory.tick_bytes(description, "bfloat16", num_tokens=10)

    assert memory.tick_bytes(description, "bfloat16", "nf4", num_tokens=10) == plain + 2 * 64 * 32
    need = memory.trainer_bytes(description, "bfloat16", "nf4", num_tokens=10)
    assert need == memory.base_bytes(description, "bfloat16", "nf4") + plain + 2 * 64 * 32


def test_a_job_with_dropout_keeps_a_byte_for_each_input_of_each_linear_and_token_of_its_slice() -> None:
    description = {"linear_shapes": SHAPES}

    assert own_bytes(description) == 16_000
    assert own_bytes(description, dropout=0.1) == 16_000 + 1024 * 32 * 4


def test_a_start_that_is_subtracted_stands_beside_the_weights_in_the_bases_precision() -> None:
    for precision, width in (("bfloat16", 2), ("float32", 4)):
        own = own_bytes({}, precision, init_lora_weights="pissa")
        assert own == own_bytes({}, precision) + 2 * width * 1000


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3 * 10**12, "3.0 TB")]
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    assert memory.readable(num_bytes) == text


def test_a_row_or_pair_longer_than_a_slice_brings_its_own_activations() -> None:
    description = {"linear_shapes": SHAPES}
    usual = own_bytes(description, "bfloat16", longest_example=1024)
    longer = own_bytes(description, "bfloat16", longest_example=1500)

    assert usual == own_bytes(description, "bfloat16", longest_example=513)
    assert longer - usual == 476 * memory.activation_bytes_per_token(SHAPES, "bfloat16")
