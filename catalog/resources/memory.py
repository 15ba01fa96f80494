"""Byte arithmetic for placing jobs: what an adapter's row, a base and a tick occupy. Pure; all results in bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from catalog.spec.lora import begins_with_the_base
from catalog.spec.target_modules import Adapted, linears_of

VECTORS_PER_ROW = 4
"""Parameters, gradient and the two moments of AdamW, all fp32. SGD's row is as large, and Adafactor's about half."""
ACTIVATIONS_PER_FEATURE = 2
"""Numbers kept for the backward per input feature of a linear: its input, and what norms and activations keep.
The mask of a job's dropout is beside these: see MASK_BYTES_PER_FEATURE."""
MASK_BYTES_PER_FEATURE = 1
"""What dropout kept of each input feature of a linear, per token of its job, until the backward."""
PASSING_NUMBERS_PER_FEATURE = 6
"""Numbers that a pass without backward has at one time, a token, per feature of the widest linear: a gated
feed-forward's inputs and outputs, and the residual stream with what a norm makes of it."""
BYTES_PER_NUMBER = {"bfloat16": 2, "float32": 4}
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
"""Weights that share a scale of one byte, and scales that share one of four (QLoRA, arXiv 2305.14314)."""
NF4_TABLE_BYTES = 4 * (16 + 256 + 1)
"""A matrix's two code books and the offset of its scales, as bitsandbytes keeps them."""
JOB_TOKENS = 1024
"""What one job puts into a tick; more only where a single row is longer."""
SLICE_TOKENS = 512
"""Of one slice: half of what a job puts into a tick, so that one by itself has work for two cores. Where a step is cut
decides how its gradients are rounded, so this is in the digest of a job's configuration."""
TICK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""What a tick grows to with the pack, by kind of device; of a CPU, for each core. Past these a larger tick gained
nothing where it was measured (CPU) or is expected to (GPU)."""
FURTHER_SLICES = 2
"""Of a job, in one tick: any two that follow each other are longer than one may be, so three fit into JOB_TOKENS."""
LOGIT_CHUNK_ROWS = 256
"""Positions whose logits exist at one time."""

Shapes = Mapping[str, Any]
"""{"q_proj": [[out_features, in_features], count], …}, as lora_core describes a base."""


def adapter_parameters(targets: Iterable[Adapted], *, use_dora: bool) -> int:
    """Numbers in A (rank x in) and B (out x rank) over every target, and in DoRA's magnitudes (out)."""
    return sum(
        target.rank * (target.linear.out_features + target.linear.in_features)
        + (target.linear.out_features if use_dora else 0)
        for target in targets
    )


def row_bytes(num_parameters: int, precision: str, *, optimizer: str = "adamw", lowest_rank: int = 1) -> int:
    """One job's row with its gradient and what its optimizer remembers; on a base that is not fp32 also the weights in
    its dtype.

    Adafactor remembers in + out + 2r numbers for the r · (in + out) of a layer, and with DoRA out more; r is no larger
    than half of in + out where it makes sense, so 3/r of the parameters is enough: a row of rank 16 takes 9 bytes a
    parameter and not 16, beside that copy. lowest_rank: of the job's layers.
    """
    copy_bytes = 0 if precision == "float32" else BYTES_PER_NUMBER[precision]
    vectors = 4 * num_parameters * VECTORS_PER_ROW
    if optimizer == "adafactor":
        vectors = 4 * (2 * num_parameters + min(2 * num_parameters, math.ceil(3 * num_parameters / lowest_rank)))
    return vectors + copy_bytes * num_parameters


def lowest_rank(lora: Mapping[str, Any]) -> int:
    """Of a job's record, pattern or not."""
    by_pattern: Mapping[str, int] = lora.get("rank_pattern") or {}
    return min([int(lora["rank"]), *by_pattern.values()])


def own_parts(
    description: Mapping[str, Any],
    precision: str,
    *,
    num_parameters: int,
    dropout: float,
    keeps_best: bool = False,
    keeps_parent: bool = False,
    use_dora: bool = False,
    init_lora_weights: str | None = None,
    batch_size: int = 1,
    longest_example: int | None = None,
    samples: Mapping[str, Any] | None = None,
    optimizer: str = "adamw",
    lowest_rank: int = 1,
    recomputes: bool = False,
) -> dict[str, int]:
    """What a job takes wherever it trains, beside its part of a tick, by what it is for. precision: the base's.

    Its row; the best weights where it keeps them; with DoRA norm and factor of each output, as if of every linear;
    the start that PiSSA and OLoRA subtract, in the base's precision; where a step may have two slices or more, the
    gradient that each but the first adds to. And whatever is the most beyond a slice of JOB_TOKENS, for these come
    one after another: what its start is computed with, what its largest slice keeps (with dropout the masks and
    with DoRA the products that it scales, as if of every linear), and the pass of its samples.

    keeps_parent: whether it is compared with the adapter that it continues, whose weights then stand beside its own.
    longest_example: tokens of its longest row or pair of rows, which is never cut; None where it isn't known. A
    preference's pass of what it compares with keeps nothing for a backward and is over before its own begins.
    recomputes: on a device that computes blocks again in the backward where memory is short, as an engine does on a
    GPU; there a long row keeps what enters the blocks, one block at a time, and what DoRA and dropout keep even so.
    """
    shapes: Shapes = description.get("linear_shapes", {})
    width, subtracts_start = BYTES_PER_NUMBER[precision], begins_with_the_base(init_lora_weights)
    is_one_slice = bool(longest_example) and batch_size * (longest_example or 0) <= SLICE_TOKENS
    slice_tokens, usual = max(JOB_TOKENS, longest_example or 0), slice_bytes(description, precision)
    even_so = slice_tokens * _input_features(shapes) * MASK_BYTES_PER_FEATURE if dropout else 0
    even_so += slice_tokens * _output_features(shapes) * width if use_dora else 0
    largest = slice_tokens * activation_bytes_per_token(shapes, precision) + even_so
    if recomputes and slice_tokens > JOB_TOKENS:
        recomputed = slice_tokens * _recomputed_bytes_per_token(description, precision)
        largest = max(usual + even_so, min(largest, recomputed + even_so))
    start = _start_bytes(description, precision) if subtracts_start else 0
    return {
        "row": row_bytes(num_parameters, precision, optimizer=optimizer, lowest_rank=lowest_rank),
        "best_weights": 4 * num_parameters if keeps_best else 0,
        "parent": (4 if precision == "float32" else 4 + width) * num_parameters if keeps_parent else 0,
        "dora": 2 * 4 * _output_features(shapes) if use_dora else 0,
        "subtracted_start": 2 * num_parameters * width if subtracts_start else 0,
        "slice_gradients": 0 if is_one_slice else FURTHER_SLICES * 4 * num_parameters,
        "beyond_a_slice": max(largest, start, samples_bytes(description, precision, samples)) - usual,
    }


def samples_bytes(description: Mapping[str, Any], precision: str, samples: Mapping[str, Any] | None) -> int:
    """What the answers to a job's prompts take at one time: all in one pass that keeps nothing for a backward, and the
    keys and values of all tokens: of a family whose keys have no linear by that name, as many as hidden features.

    A prompt has no more tokens than characters, but for those by which a chat template surrounds it.
    """
    if samples is None:
        return 0
    num_tokens = sum(len(prompt) + int(samples["max_tokens"]) for prompt in samples["prompts"])
    shapes: Shapes = description.get("linear_shapes", {})
    widest = max((max(shape) for shape, _ in shapes.values()), default=0)
    features = shapes["k_proj"][0][0] if "k_proj" in shapes else int(description.get("hidden_size", 0))
    kept = 2 * features * int(description.get("num_layers", 0))
    return num_tokens * (widest * PASSING_NUMBERS_PER_FEATURE + kept) * BYTES_PER_NUMBER[precision]


def _start_bytes(description: Mapping[str, Any], precision: str) -> int:
    """To decompose the largest weight: in fp32, with the copy that LAPACK overwrites, both factors, and its work."""
    cast = 0 if precision == "float32" else 1
    sizes = ((2 + cast) * rows * columns + min(rows, columns) ** 2 for rows, columns in _matrices(description))
    return 4 * max(sizes, default=0)


def base_bytes(description: Mapping[str, Any], precision: str, quantization: str = "none") -> int:
    """The frozen weights. Quantized are the linears that an adapter may be on; embeddings, norms and head are not."""
    num_parameters, width = int(description.get("num_parameters", 0)), BYTES_PER_NUMBER[precision]
    if quantization == "none":
        return num_parameters * width
    matrices = _matrices(description)
    num_quantized = sum(rows * columns * count for (rows, columns), count in matrices.items())
    of_matrix = {"nf4": _nf4_bytes, "int8": _int8_bytes}[quantization]
    quantized = sum(of_matrix(rows, columns) * count for (rows, columns), count in matrices.items())
    return quantized + max(0, num_parameters - num_quantized) * width


def _matrices(description: Mapping[str, Any]) -> Counter[tuple[int, int]]:
    """(out_features, in_features) of what quantization takes, and how many of each."""
    return Counter((linear.out_features, linear.in_features) for linear in linears_of(description))


def _nf4_bytes(out_features: int, in_features: int) -> int:
    """Half a byte a weight, with double quantization: about 0.516 in all where the matrix is large."""
    blocks = math.ceil(out_features * in_features / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NF4_SCALE_BLOCK)
    return math.ceil(out_features * in_features / 2) + scales + NF4_TABLE_BYTES


def _int8_bytes(out_features: int, in_features: int) -> int:
    """A byte a weight, and a scale a row."""
    return out_features * in_features + 4 * out_features


def activation_bytes_per_token(shapes: Shapes, precision: str) -> int:
    """What one token of a tick keeps until its backward."""
    return _input_features(shapes) * ACTIVATIONS_PER_FEATURE * BYTES_PER_NUMBER[precision]


def _recomputed_bytes_per_token(description: Mapping[str, Any], precision: str) -> int:
    """What one token keeps where each block is computed again: what enters the blocks, and all of one of them."""
    num_layers = max(1, int(description.get("num_layers", 1)))
    of_all = activation_bytes_per_token(description.get("linear_shapes", {}), precision)
    entering = num_layers * int(description.get("hidden_size", 0)) * BYTES_PER_NUMBER[precision]
    return entering + math.ceil(of_all / num_layers)


def tick_parts(
    description: Mapping[str, Any], precision: str, quantization: str = "none", *, num_tokens: int
) -> dict[str, int]:
    """Activations and one chunk of logits (fp32, with their gradient) of a tick of `num_tokens`.

    Of a quantized base also one linear's weights in the dtype: they are restored for each product.
    """
    shapes: Shapes = description.get("linear_shapes", {})
    restored = 0
    if quantization != "none":
        largest = max((rows * columns for rows, columns in _matrices(description)), default=0)
        restored = largest * BYTES_PER_NUMBER[precision]
    return {
        "activations": num_tokens * activation_bytes_per_token(shapes, precision),
        "logits": 2 * 4 * LOGIT_CHUNK_ROWS * int(description.get("vocab_size", 0)),
        "restored_weights": restored,
    }


def tick_bytes(description: Mapping[str, Any], precision: str, quantization: str = "none", *, num_tokens: int) -> int:
    """All of `tick_parts`."""
    return sum(tick_parts(description, precision, quantization, num_tokens=num_tokens).values())


def slice_bytes(description: Mapping[str, Any], precision: str) -> int:
    """Activations that a further job brings into a tick that has not reached its size yet."""
    return JOB_TOKENS * activation_bytes_per_token(description.get("linear_shapes", {}), precision)


def tick_tokens(kind: str, *, num_lanes: int) -> int:
    """What a tick grows to. kind: of the device; num_lanes: cores of a CPU, each of which computes its own slices."""
    return TICK_TOKENS[kind] * (num_lanes if kind == "cpu" else 1)


def widens_tick(num_before: int, *, tick_tokens: int) -> bool:
    """Whether a job beside `num_before` others brings a slice of its own; the first one's is in `trainer_bytes`."""
    return 0 < num_before < tick_tokens // JOB_TOKENS


def trainer_bytes(
    description: Mapping[str, Any], precision: str, quantization: str = "none", *, num_tokens: int = JOB_TOKENS
) -> int:
    """A trainer before its first job: base and one tick, in which a job alone has one slice on any device."""
    base = base_bytes(description, precision, quantization)
    return base + tick_bytes(description, precision, quantization, num_tokens=num_tokens)


def readable(num_bytes: float) -> str:
    """For a sentence, in decimal units as everywhere else: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _output_features(shapes: Shapes) -> int:
    """Of all linears together."""
    return sum(out_features * count for (out_features, _), count in shapes.values())


def _input_features(shapes: Shapes) -> int:
    """Of all linears together."""
    return sum(in_features * count for (_, in_features), count in shapes.values())
