"""Byte arithmetic, compared with numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.resources import memory
from catalog.resources.memory import BaseModelMemory, JobMemory
from catalog.spec.target_modules import Adapted, Linear
from lora_core.kernels.gpu.tables import WIDTHS
from tests.catalog.world import linears

LINEARS = linears(q_proj=([64, 32], 2), v_proj=([16, 32], 2))
SHAPES = LINEARS["linear_shapes"]


def test_adapter_parameters_are_rank_times_in_plus_out_per_target() -> None:
    adapted = [
        Adapted(linear=Linear(path="q_proj", out_features=64, in_features=32), rank=4),
        Adapted(linear=Linear(path="v_proj", out_features=16, in_features=32), rank=8),
    ]

    assert memory.adapter_parameters(adapted, use_dora=False) == 4 * 96 + 8 * 48
    assert memory.adapter_parameters(adapted, use_dora=True) == 4 * 96 + 8 * 48 + 64 + 16


def own_bytes(
    description: dict[str, Any], precision: str = "float32", *, longest_example: int | None = 1, **options: Any
) -> int:
    """Return the memory of a job with 1,000 parameters, without A x, whose steps have one slice."""
    parts = own_parts(description, precision, longest_example=longest_example, **options)
    return sum(parts.values()) - parts["lora_products"]


def own_parts(description: dict[str, Any], precision: str, **options: Any) -> dict[str, int]:
    recomputes = options.pop("recomputes", False)
    given: dict[str, Any] = {"num_parameters": 1000} | options
    facts = JobMemory(**given)
    return facts.parts(BaseModelMemory(description, precision), recomputes=recomputes)


def test_adapter_state_has_four_fp32_vectors_and_a_copy_in_the_base_dtype() -> None:
    assert JobMemory(num_parameters=1000).row_bytes("float32") == 16_000
    assert JobMemory(num_parameters=1000).row_bytes("bfloat16") == 18_000


def test_keeping_the_best_weights_adds_one_vector() -> None:
    assert own_bytes({}, keeps_best=True) == 20_000


def test_possible_second_slice_adds_a_gradient() -> None:
    assert own_bytes({}, batch_size=4, longest_example=128) == 16_000
    assert own_bytes({}, batch_size=4, longest_example=129) == 24_000
    assert own_bytes({}, longest_example=None) == 24_000, "unknown lengths count as several slices"


def test_long_slices_count_in_full_unless_a_step_is_shorter() -> None:
    description = {"linear_shapes": SHAPES}
    a_token = BaseModelMemory({"linear_shapes": SHAPES}, "bfloat16").activation_bytes_per_token()
    usual = own_bytes(description, "bfloat16")
    long = memory.SLICE_TOKENS["cuda"]

    assert own_bytes(description, "bfloat16", slice_tokens=long) == usual
    step = own_bytes(description, "bfloat16", slice_tokens=long, batch_size=16, longest_example=128)
    assert step == usual + (2048 - memory.JOB_TOKENS) * a_token
    many = own_bytes(description, "bfloat16", slice_tokens=long, batch_size=64, longest_example=128)
    assert many == usual + memory.FURTHER_SLICES * 4 * 1000 + (long - memory.JOB_TOKENS) * a_token


def test_initialization_and_samples_add_memory_only_beyond_a_slice() -> None:
    few, many = {"prompts": ["a" * 100], "max_tokens": 28}, {"prompts": ["a" * 2000] * 8, "max_tokens": 128}
    tall = linears(q_proj=([8192, 512], 1))
    plain = own_bytes({"linear_shapes": SHAPES}, "bfloat16")

    assert own_bytes({"linear_shapes": SHAPES}, "bfloat16", samples=few) == plain
    slice_bytes = BaseModelMemory({"linear_shapes": SHAPES}, "bfloat16").slice_bytes()
    answers = 8 * 2128 * 64 * 6 * 2
    assert own_bytes({"linear_shapes": SHAPES}, "bfloat16", samples=many) == plain + answers - slice_bytes
    sized = {"linear_shapes": SHAPES, "hidden_size": 64, "num_layers": 3}
    keys = 8 * 2128 * 2 * 3 * 64 * 2
    assert own_bytes(sized, "bfloat16", samples=many) == plain + answers + keys - slice_bytes
    grouped = sized | {"linear_shapes": SHAPES | {"k_proj": [[16, 64], 3]}}
    fewer = own_bytes(grouped, "bfloat16", samples=many) - own_bytes(grouped, "bfloat16")
    assert fewer == answers + keys // 4 - BaseModelMemory(grouped, "bfloat16").slice_bytes()
    start = 4 * (3 * 8192 * 512 + 512 * 512)
    begun = own_bytes(tall, "bfloat16", init_lora_weights="pissa")
    assert begun == own_bytes(tall, "bfloat16") + 4 * 1000 + start - BaseModelMemory(tall, "bfloat16").slice_bytes()


def test_activation_checkpointing_reduces_the_memory_of_long_rows() -> None:
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
    assert counted[1100, True] == counted[1024, True] == row, "a slice counts in full on any device"
    with_dora = [
        own_bytes(description, "bfloat16", longest_example=8192, recomputes=True, use_dora=on) for on in (0, 1)
    ]
    assert with_dora[1] - with_dora[0] == 4 * 64 * (2 * 4 + 2 * 8192), "DoRA keeps its matmul outputs and norms"


WIDE = 10**9
"""More parameters than any rank of SHAPES has."""


@pytest.mark.parametrize(("precision", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_token_keeps_the_product_of_each_linear_layer(precision: str, width: int, init: str) -> None:
    given: dict[str, Any] = {"longest_example": 2048, "init_lora_weights": init, "num_parameters": WIDE}

    parts = own_parts({"linear_shapes": SHAPES}, precision, **given, highest_rank=200)

    times = 2 if init == "pissa" else 1  # it multiplies by A and by its start
    assert parts["lora_products"] == 2048 * 4 * times * 200 * width


@pytest.mark.parametrize(
    ("rank", "options", "kept"),
    [
        (1, {}, 16),
        (33, {}, 64),
        (128, {}, 128),
        (129, {}, 129),
        (40, {"init_lora_weights": "pissa"}, 128),
        (33, {"use_dora": True}, 33),
    ],
)
def test_products_are_padded_as_by_the_kernels_of_a_gpu(rank: int, options: dict[str, Any], kept: int) -> None:
    given: dict[str, Any] = {"num_parameters": WIDE, "lowest_rank": rank, "highest_rank": rank}

    for recomputes in (False, True):
        parts = own_parts({"linear_shapes": SHAPES}, "bfloat16", **given, **options, recomputes=recomputes)
        assert parts["lora_products"] == 1024 * 4 * kept * 2


def test_widths_are_those_of_the_kernels() -> None:
    assert memory.KERNEL_WIDTHS == WIDTHS


def test_padding_of_unequal_ranks_is_not_underestimated() -> None:
    """Three layers have rank 1, and one has rank 16: each keeps 16 numbers."""
    num_parameters = 2 * (64 + 32) + 1 * (16 + 32) + 16 * (16 + 32)
    ranks: dict[str, Any] = {"lowest_rank": 1, "highest_rank": 16, "num_parameters": num_parameters}

    assert own_parts({"linear_shapes": SHAPES}, "bfloat16", **ranks)["lora_products"] == 1024 * 4 * 16 * 2


def test_products_of_a_job_with_few_linear_layers_follow_from_its_parameters() -> None:
    """One layer of rank 100, and none in the others."""
    parts = own_parts({"linear_shapes": SHAPES}, "float32", num_parameters=100 * (16 + 32), highest_rank=100)

    assert parts["lora_products"] == 1024 * 100 * 4


def test_pissa_initialization_is_kept_in_the_precision_of_the_base() -> None:
    for precision, width in (("bfloat16", 2), ("float32", 4)):
        own = own_bytes({}, precision, init_lora_weights="pissa")
        assert own == own_bytes({}, precision) + 2 * width * 1000


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3 * 10**12, "3.0 TB")]
)
def test_byte_counts_are_readable(num_bytes: int, text: str) -> None:
    assert memory.readable(num_bytes) == text


def test_rows_longer_than_a_slice_add_activations() -> None:
    description = {"linear_shapes": SHAPES}
    usual = own_bytes(description, "bfloat16", longest_example=1024)
    longer = own_bytes(description, "bfloat16", longest_example=1500)

    assert usual == own_bytes(description, "bfloat16", longest_example=513)
    assert longer - usual == 476 * BaseModelMemory({"linear_shapes": SHAPES}, "bfloat16").activation_bytes_per_token()
