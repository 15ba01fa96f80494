"""Byte arithmetic, compared with numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.resources import memory
from catalog.spec.target_modules import Adapted, Linear
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
    given: dict[str, Any] = {"dropout": 0.0, "longest_example": longest_example, "highest_rank": 0, **options}
    return sum(memory.own_parts(description, precision, num_parameters=1000, **given).values())


def test_adapter_state_has_four_fp32_vectors_and_a_copy_in_the_base_dtype() -> None:
    assert memory.row_bytes(1000, "float32") == 16_000
    assert memory.row_bytes(1000, "bfloat16") == 18_000


def test_keeping_the_best_weights_adds_one_vector() -> None:
    assert own_bytes({}, keeps_best=True) == 20_000


def test_possible_second_slice_adds_a_gradient() -> None:
    assert own_bytes({}, batch_size=4, longest_example=128) == 16_000
    assert own_bytes({}, batch_size=4, longest_example=129) == 24_000
    assert own_bytes({}, longest_example=None) == 24_000, "unknown lengths count as several slices"


def test_long_slices_count_in_full_unless_a_step_is_shorter() -> None:
    description = {"linear_shapes": SHAPES}
    a_token = memory.activation_bytes_per_token(SHAPES, "bfloat16")
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
    slice_bytes = memory.slice_bytes({"linear_shapes": SHAPES}, "bfloat16")
    answers = 8 * 2128 * 64 * 6 * 2
    assert own_bytes({"linear_shapes": SHAPES}, "bfloat16", samples=many) == plain + answers - slice_bytes
    sized = {"linear_shapes": SHAPES, "hidden_size": 64, "num_layers": 3}
    keys = 8 * 2128 * 2 * 3 * 64 * 2
    assert own_bytes(sized, "bfloat16", samples=many) == plain + answers + keys - slice_bytes
    grouped = sized | {"linear_shapes": SHAPES | {"k_proj": [[16, 64], 3]}}
    fewer = own_bytes(grouped, "bfloat16", samples=many) - own_bytes(grouped, "bfloat16")
    assert fewer == answers + keys // 4 - memory.slice_bytes(grouped, "bfloat16")
    start = 4 * (3 * 8192 * 512 + 512 * 512)
    begun = own_bytes(tall, "bfloat16", init_lora_weights="pissa")
    assert begun == own_bytes(tall, "bfloat16") + 4 * 1000 + start - memory.slice_bytes(tall, "bfloat16")


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


@pytest.mark.parametrize(("precision", "width"), [("bfloat16", 2), ("float32", 4)])
def test_trainer_memory_is_its_base_and_one_tick(precision: str, width: int) -> None:
    description = {"num_parameters": 500, "linear_shapes": SHAPES, "vocab_size": 10}

    assert memory.base_bytes(description, precision) == 500 * width
    kept = 2 * (64 + 16 + 32)  # both outputs, and the input that they share
    assert memory.activation_bytes_per_token(SHAPES, precision) == kept * width
    assert memory.activation_bytes_per_token(SHAPES, precision, "cuda") == kept * width, "its norms are not known"
    logits = 2 * 4 * 256 * 10
    need = memory.trainer_bytes(description, precision, num_tokens=100)
    assert need == 500 * width + 100 * kept * width + logits


def test_gpu_kernels_keep_no_output_of_a_norm_or_a_gated_activation_and_torch_keeps_more() -> None:
    attention = {"q_proj": [[64, 32], 2], "k_proj": [[16, 32], 2], "v_proj": [[16, 32], 2], "o_proj": [[32, 64], 2]}
    mlp = {"gate_proj": [[96, 32], 2], "up_proj": [[96, 32], 2], "down_proj": [[32, 96], 2]}

    cpu = memory.activation_bytes_per_token(attention | mlp, "bfloat16", "cpu")
    cuda = memory.activation_bytes_per_token(attention | mlp, "bfloat16", "cuda")
    torch = memory.activation_bytes_per_token(attention | mlp, "bfloat16", "torch")
    of_float32 = memory.activation_bytes_per_token(attention | mlp, "float32", "torch")

    assert cpu - cuda == 2 * 2 * (32 + 32 + 96)
    assert torch - cpu == 2 * 2 * (32 + 32 + 96), "copies of the norms' inputs in fp32, and silu(gate)"
    assert of_float32 - 2 * cpu == 4 * 2 * 96, "silu(gate) alone"


def test_quantized_base_has_quantized_linears_and_the_rest_in_its_dtype() -> None:
    description = {"num_parameters": 10_000, "vocab_size": 10, **LINEARS}
    weights, tables = 2 * (64 * 32 + 16 * 32), 4 * (16 + 256 + 1)

    int8 = memory.base_bytes(description, "bfloat16", "int8")
    nf4 = memory.base_bytes(description, "float32", "nf4")

    assert int8 == weights + 4 * 2 * (64 + 16) + 2 * (10_000 - weights)
    scales = 2 * (32 + 4) + 2 * (8 + 4)  # one byte per 64 weights, and four bytes per 256 of those bytes
    assert nf4 == weights // 2 + scales + 4 * tables + 4 * (10_000 - weights)


def test_nf4_uses_0_516_bytes_per_weight() -> None:
    description = {"num_parameters": 4096 * 4096, **linears(q_proj=([4096, 4096], 1))}

    nf4 = memory.base_bytes(description, "bfloat16", "nf4") / 4096**2
    assert nf4 == pytest.approx(0.516, abs=0.001)  # pyright: ignore[reportUnknownMemberType]


def test_tick_on_a_quantized_base_dequantizes_its_largest_linear() -> None:
    description = {"num_parameters": 10_000, "vocab_size": 10, **LINEARS}
    plain = memory.tick_bytes(description, "bfloat16", num_tokens=10)

    assert memory.tick_bytes(description, "bfloat16", "nf4", num_tokens=10) == plain + 2 * 64 * 32
    need = memory.trainer_bytes(description, "bfloat16", "nf4", num_tokens=10)
    assert need == memory.base_bytes(description, "bfloat16", "nf4") + plain + 2 * 64 * 32


def test_dropout_mask_uses_a_byte_per_linear_input_and_token() -> None:
    description = {"linear_shapes": SHAPES}

    assert own_bytes(description) == 16_000
    masks = 1024 * 32 * 4
    assert own_bytes(description, dropout=0.1) == 16_000 + masks
    on_gpu = {"dropout": 0.1, "recomputes": True, "precision": "bfloat16"}
    plain = {"recomputes": True, "precision": "bfloat16"}
    kept = {rank: own_bytes(description, **on_gpu, highest_rank=rank) for rank in (128, 129)}
    assert kept[128] == own_bytes(description, **plain, highest_rank=128), "a GPU's kernels keep no mask"
    assert kept[129] == own_bytes(description, **plain, highest_rank=129) + masks
    assert own_bytes(description, dropout=0.1, recomputes=True, precision="float32") == 16_000 + masks
    with_dora = own_bytes(description, use_dora=True, recomputes=True)
    assert own_bytes(description, use_dora=True, dropout=0.1, recomputes=True) == with_dora + masks


@pytest.mark.parametrize(("precision", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_token_keeps_the_small_product_of_each_linear_layer(precision: str, width: int, recomputes: bool) -> None:
    description = {"linear_shapes": SHAPES}
    given: dict[str, Any] = {"longest_example": 2048, "recomputes": recomputes}
    without = own_bytes(description, precision, **given)

    assert own_bytes(description, precision, **given, highest_rank=100) == without + 2048 * 4 * 100 * width
    begun = own_bytes(description, precision, **given, init_lora_weights="pissa")
    paired = own_bytes(description, precision, **given, init_lora_weights="pissa", highest_rank=100)
    assert paired == begun + 2048 * 4 * 200 * width, "PiSSA multiplies by A and by its start"


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
    assert longer - usual == 476 * memory.activation_bytes_per_token(SHAPES, "bfloat16")
