"""Estimates memory for placing jobs: adapter state, base model and tick. Pure; all results in bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from catalog.spec.lora import begins_with_the_base
from catalog.spec.target_modules import Adapted, linears_of

VECTORS_PER_ROW = 4
"""Parameters, gradient and the two moments of AdamW, all fp32. SGD needs as much, and Adafactor about half of it."""
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Linear layers that read the same input, which is kept once for the backward pass."""
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
RECOMPUTED_INPUTS = ("q_proj", "gate_proj", "down_proj")
"""Linear layers of a model with gated MLPs whose input is the output of a norm or of the gated activation. The backward
pass of a GPU's kernels recomputes it."""
ElementwiseKernels = Literal["cpu", "cuda", "torch"]
"""The norms and gated activations of a trainer: by the kernels of a CPU, those of a GPU, or single torch operations on
a GPU."""
MASK_BYTES_PER_FEATURE = 1
"""Dropout mask per input feature of a linear layer and per token of the job, kept until the backward pass."""
PASSING_NUMBERS_PER_FEATURE = 6
"""Values that a pass without backward holds at one time, per token and feature of the widest linear layer: inputs and
outputs of a gated feed-forward layer, the residual stream and its norm."""
BYTES_PER_NUMBER = {"bfloat16": 2, "float32": 4}
KERNEL_WIDTHS = (16, 32, 64, 128)
"""To these the LoRA kernels of a GPU pad a rank."""
GPU_KERNEL_RANK = KERNEL_WIDTHS[-1]
"""Highest rank that the LoRA kernels of a GPU take, of bfloat16 weights without DoRA. PiSSA and OLoRA subtract their
start, which doubles the rank."""
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
"""Weights that share a one-byte scale, and scales that share a four-byte scale (QLoRA, arXiv 2305.14314)."""
NF4_TABLE_BYTES = 4 * (16 + 256 + 1)
"""The two code books of a matrix and the offset of its scales, as bitsandbytes stores them."""
JOB_TOKENS = 1024
"""Tokens of one job in a tick for which memory is reserved, in addition to rows and slices that are longer."""
MOST_JOB_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Maximum tokens of one job in a tick, by kind of device, unless a single slice is longer. On a GPU, a pass of 1,024
tokens takes as long as its launches."""
SLICE_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens of one slice, by kind of device: half of MOST_JOB_TOKENS, so that a job alone in a trainer uses two cores. The
slices of a step affect the rounding of its gradients, so a job's value is fixed when the job is accepted."""
TICK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Maximum tokens of a tick, by kind of device; for a CPU per core. A larger tick gave no higher throughput in
measurements (CPU), or is not expected to (GPU)."""
FURTHER_SLICES = 2
"""Additional slices of a job in one tick. Two consecutive slices are together longer than one full slice, so at most
three fit into MOST_JOB_TOKENS."""
LOGIT_CHUNK_ROWS = 256
"""Number of positions whose logits exist at one time."""

Shapes = Mapping[str, Any]
"""{"q_proj": [[out_features, in_features], count], …}, as lora_core describes a base model."""


def adapter_parameters(targets: Iterable[Adapted], *, use_dora: bool) -> int:
    """Return the parameters of A (rank x in) and B (out x rank) of all targets, and of DoRA's magnitudes (out)."""
    return sum(
        target.rank * (target.linear.out_features + target.linear.in_features)
        + (target.linear.out_features if use_dora else 0)
        for target in targets
    )


def row_bytes(num_parameters: int, precision: str, *, optimizer: str = "adamw", lowest_rank: int = 1) -> int:
    """Return the bytes of a job's adapter state: weights, gradient and optimizer state, all fp32.

    If the base model is not fp32, a copy of the weights in its dtype is included. Adafactor stores in + out + 2r values
    for the r · (in + out) parameters of a layer, and out more with DoRA. A useful r is at most half of in + out, so 3/r
    of the parameters is enough: rank 16 takes 9 bytes per parameter instead of 16, plus the copy. `lowest_rank`: the
    lowest rank of the job's layers.
    """
    copy_bytes = 0 if precision == "float32" else BYTES_PER_NUMBER[precision]
    vectors = 4 * num_parameters * VECTORS_PER_ROW
    if optimizer == "adafactor":
        vectors = 4 * (2 * num_parameters + min(2 * num_parameters, math.ceil(3 * num_parameters / lowest_rank)))
    return vectors + copy_bytes * num_parameters


def lowest_rank(lora: Mapping[str, Any]) -> int:
    """Return the lowest rank in a job's resolved `lora`, including `rank_pattern`."""
    return min(_ranks(lora))


def highest_rank(lora: Mapping[str, Any]) -> int:
    """Return the highest rank in a job's resolved `lora`, including `rank_pattern`."""
    return max(_ranks(lora))


def _ranks(lora: Mapping[str, Any]) -> list[int]:
    by_pattern: Mapping[str, int] = lora.get("rank_pattern") or {}
    return [int(lora["rank"]), *by_pattern.values()]


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
    lowest_rank: int,
    highest_rank: int,
    slice_tokens: int = SLICE_TOKENS["cpu"],
    recomputes: bool = False,
    kernels: ElementwiseKernels | None = None,
) -> dict[str, int]:
    """Return the memory of a job itself on any device, without its part of a tick, by part (see `gpus.PARTS`).

    - `row`: the adapter state.
    - `best_weights`: a copy of the weights, if the job keeps the best ones.
    - `dora`: a norm and a factor of each output, for all linear layers of the base model (an upper bound).
    - `subtracted_start`: the initial weights that PiSSA and OLoRA subtract, in the precision of the base model.
    - `slice_gradients`: gradient buffers of the slices after the first, if a step may have more than one slice.
    - `lora_products`: A x of each token of the largest slice, padded as by the kernels of a GPU.
    - `beyond_a_slice`: the largest of three phases that never overlap, minus a slice of JOB_TOKENS: the computation of
      the initial weights, the largest slice (with dropout masks and the outputs that DoRA scales, for all linear
      layers), and the pass for the samples.

    `precision`: of the base model. `keeps_parent`: whether the loss compares with the parent adapter, whose weights are
    then in memory too. `longest_example`: tokens of its longest row or pair of rows, which is never split; None if
    unknown. The reference pass of a preference loss keeps nothing for a backward pass and is over before the job's own
    pass begins. `slice_tokens`: maximum tokens of a slice, unless a row is longer. `recomputes`: whether the engine
    recomputes activations when memory is short, as it does on a GPU. A long slice then keeps the inputs of the blocks,
    one block at a time, and still the values of LoRA, DoRA and dropout. `kernels`: those of the job's trainer. None if
    no trainer has it yet: its largest slice then runs with the kernels of the device, and JOB_TOKENS with those of a
    CPU.
    """
    shapes: Shapes = description.get("linear_shapes", {})
    width, subtracts_start = BYTES_PER_NUMBER[precision], begins_with_the_base(init_lora_weights)
    step_tokens = batch_size * longest_example if longest_example else math.inf
    is_one_slice = step_tokens <= slice_tokens
    most_tokens = int(max(JOB_TOKENS, longest_example or 0, min(slice_tokens, step_tokens)))
    usual = slice_bytes(description, precision, kernels or "cpu")
    kernels = kernels or ("cuda" if recomputes else "cpu")
    times = 2 if subtracts_start else 1
    ranks = times * sum_of_ranks(shapes, highest_rank, num_parameters)
    # The kernels of a GPU draw a mask again instead, but they take only what lora_core/layers/tiled_lora.py names.
    fits_kernels = not use_dora and precision != "float32" and times * highest_rank <= GPU_KERNEL_RANK
    has_masks = dropout and not (recomputes and fits_kernels)
    if fits_kernels:
        ranks = padded_ranks(shapes, ranks, times * lowest_rank, times * highest_rank)
    even_so = most_tokens * _input_features(shapes) * MASK_BYTES_PER_FEATURE if has_masks else 0
    even_so += most_tokens * _output_features(shapes) * width if use_dora else 0
    largest = most_tokens * activation_bytes_per_token(shapes, precision, kernels) + even_so
    if recomputes:
        recomputed = most_tokens * _recomputed_bytes_per_token(description, precision, kernels)
        largest = max(usual + even_so, min(largest, recomputed + even_so))
    start = _start_bytes(description, precision) if subtracts_start else 0
    return {
        "row": row_bytes(num_parameters, precision, optimizer=optimizer, lowest_rank=lowest_rank),
        "best_weights": 4 * num_parameters if keeps_best else 0,
        "parent": (4 if precision == "float32" else 4 + width) * num_parameters if keeps_parent else 0,
        "dora": 2 * 4 * _output_features(shapes) if use_dora else 0,
        "subtracted_start": 2 * num_parameters * width if subtracts_start else 0,
        "slice_gradients": 0 if is_one_slice else FURTHER_SLICES * 4 * num_parameters,
        "lora_products": most_tokens * ranks * width,
        "beyond_a_slice": max(largest, start, samples_bytes(description, precision, samples)) - usual,
    }


def samples_bytes(description: Mapping[str, Any], precision: str, samples: Mapping[str, Any] | None) -> int:
    """Return the memory of one pass that answers all sample prompts, and of the keys and values of all its tokens.

    The pass keeps nothing for a backward pass. If no linear layer is named `k_proj`, keys have `hidden_size` features.
    A prompt is assumed to have at most one token per character; tokens of the chat template are not counted.
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
    """Return the memory to decompose the largest weight: in fp32, with the copy that LAPACK overwrites, both factors
    and its workspace."""
    cast = 0 if precision == "float32" else 1
    sizes = ((2 + cast) * rows * columns + min(rows, columns) ** 2 for rows, columns in _matrices(description))
    return 4 * max(sizes, default=0)


def base_bytes(description: Mapping[str, Any], precision: str, quantization: str = "none") -> int:
    """Return the bytes of the frozen weights. Quantization covers the linear layers that an adapter may target, but not
    embeddings, norms and the head."""
    num_parameters, width = int(description.get("num_parameters", 0)), BYTES_PER_NUMBER[precision]
    if quantization == "none":
        return num_parameters * width
    matrices = _matrices(description)
    num_quantized = sum(rows * columns * count for (rows, columns), count in matrices.items())
    of_matrix = {"nf4": _nf4_bytes, "int8": _int8_bytes}[quantization]
    quantized = sum(of_matrix(rows, columns) * count for (rows, columns), count in matrices.items())
    return quantized + max(0, num_parameters - num_quantized) * width


def _matrices(description: Mapping[str, Any]) -> Counter[tuple[int, int]]:
    """Count the linear layers that quantization covers, by (out_features, in_features)."""
    return Counter((linear.out_features, linear.in_features) for linear in linears_of(description))


def _nf4_bytes(out_features: int, in_features: int) -> int:
    """Return half a byte per weight and the double-quantized scales: about 0.516 bytes per weight of a large matrix."""
    blocks = math.ceil(out_features * in_features / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NF4_SCALE_BLOCK)
    return math.ceil(out_features * in_features / 2) + scales + NF4_TABLE_BYTES


def _int8_bytes(out_features: int, in_features: int) -> int:
    """Return one byte per weight, and four bytes per row for its scale."""
    return out_features * in_features + 4 * out_features


def activation_bytes_per_token(shapes: Shapes, precision: str, kernels: ElementwiseKernels = "cpu") -> int:
    """Return the activations that one token of a tick keeps until its backward pass.

    Each linear layer's output is kept by what reads it: attention, the gated activation, or the next norm, after the
    residual sum. Each input is kept for the gradient of A, once if several layers share it. The kernels of a GPU do not
    keep RECOMPUTED_INPUTS. Single torch operations keep them, silu(gate), and the residual sum in fp32, of which a norm
    makes a copy unless the sum is fp32 already. A job with dropout also needs MASK_BYTES_PER_FEATURE.

    A job is accepted before its trainer is known, and its needs assume the kernels of a CPU.
    """
    others = {name for names in SHARED_INPUTS if names[0] in shapes for name in names[1:]}
    inputs = _input_features({name: shape for name, shape in shapes.items() if name not in others})
    if kernels != "cpu" and shapes.keys() >= set(GATED_MLP):
        if kernels == "cuda":
            inputs -= _input_features({name: shapes[name] for name in RECOMPUTED_INPUTS if name in shapes})
        else:
            inputs += _features_of_torch(shapes, precision)
    return (_output_features(shapes) + inputs) * BYTES_PER_NUMBER[precision]


def sum_of_ranks(shapes: Shapes, highest_rank: int, num_parameters: int) -> int:
    """Return an upper bound of the sum of the ranks of a job's linear layers, from its number of parameters."""
    narrowest = min((sum(shape) for shape, _ in shapes.values()), default=1)
    return min(highest_rank * sum(count for _, count in shapes.values()), num_parameters // narrowest)


def padded_ranks(shapes: Shapes, ranks: int, lowest_rank: int, highest_rank: int) -> int:
    """Return an upper bound of the sum of `ranks` after the kernels of a GPU have padded each of them."""
    factor = kernel_width(lowest_rank) / lowest_rank
    if lowest_rank < highest_rank:
        factor = max(2, factor)  # above the first width, a padded rank is less than twice as high
    return min(sum(count for _, count in shapes.values()) * kernel_width(highest_rank), math.ceil(ranks * factor))


def kernel_width(rank: int) -> int:
    """Return the numbers of A x that the kernels of a GPU keep for a rank of at most GPU_KERNEL_RANK."""
    return next(width for width in KERNEL_WIDTHS if width >= rank)


def _features_of_torch(shapes: Shapes, precision: str) -> int:
    """Return the features that norms and gated activations of single torch operations keep in addition.

    They are silu(gate), and of each norm an fp32 copy of its input, in place of the half as large input.
    """
    copied = RECOMPUTED_INPUTS if BYTES_PER_NUMBER[precision] < 4 else ("down_proj",)
    return _input_features({name: shapes[name] for name in copied if name in shapes})


def _recomputed_bytes_per_token(description: Mapping[str, Any], precision: str, kernels: ElementwiseKernels) -> int:
    """Return the activations per token with recomputation, on a GPU: the inputs of all blocks, and all of one block."""
    num_layers = max(1, int(description.get("num_layers", 1)))
    of_all = activation_bytes_per_token(description.get("linear_shapes", {}), precision, kernels)
    entering = num_layers * int(description.get("hidden_size", 0)) * BYTES_PER_NUMBER[precision]
    return entering + math.ceil(of_all / num_layers)


def tick_parts(
    description: Mapping[str, Any],
    precision: str,
    quantization: str = "none",
    *,
    num_tokens: int,
    kernels: ElementwiseKernels = "cpu",
) -> dict[str, int]:
    """Return the parts of a tick of `num_tokens`: activations, and one chunk of logits (fp32, with their gradient).

    For a quantized base model also the weights of its largest linear layer, which are dequantized for each matmul.
    """
    shapes: Shapes = description.get("linear_shapes", {})
    restored = 0
    if quantization != "none":
        largest = max((rows * columns for rows, columns in _matrices(description)), default=0)
        restored = largest * BYTES_PER_NUMBER[precision]
    return {
        "activations": num_tokens * activation_bytes_per_token(shapes, precision, kernels),
        "logits": 2 * 4 * LOGIT_CHUNK_ROWS * int(description.get("vocab_size", 0)),
        "restored_weights": restored,
    }


def tick_bytes(
    description: Mapping[str, Any],
    precision: str,
    quantization: str = "none",
    *,
    num_tokens: int,
    kernels: ElementwiseKernels = "cpu",
) -> int:
    """Return the sum of `tick_parts`."""
    return sum(tick_parts(description, precision, quantization, num_tokens=num_tokens, kernels=kernels).values())


def slice_bytes(description: Mapping[str, Any], precision: str, kernels: ElementwiseKernels = "cpu") -> int:
    """Return the activations that one more job adds to a tick that is below its maximum size."""
    return JOB_TOKENS * activation_bytes_per_token(description.get("linear_shapes", {}), precision, kernels)


def tick_tokens(kind: str, *, num_lanes: int) -> int:
    """Return the maximum tokens of a tick.

    `kind`: of the device. `num_lanes`: cores of a CPU, each of which computes its own slices.
    """
    return TICK_TOKENS[kind] * (num_lanes if kind == "cpu" else 1)


def widens_tick(num_before: int, *, tick_tokens: int) -> bool:
    """Return whether a job that joins `num_before` others adds a slice to the tick.

    The slice of the first job is part of `trainer_bytes`.
    """
    return 0 < num_before < tick_tokens // JOB_TOKENS


def trainer_bytes(
    description: Mapping[str, Any],
    precision: str,
    quantization: str = "none",
    *,
    num_tokens: int = JOB_TOKENS,
    kernels: ElementwiseKernels = "cpu",
) -> int:
    """Return the memory of a trainer before its first job: the base model and one tick with the tokens of one job."""
    base = base_bytes(description, precision, quantization)
    return base + tick_bytes(description, precision, quantization, num_tokens=num_tokens, kernels=kernels)


def readable(num_bytes: float) -> str:
    """Return a size in decimal units for a sentence: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _output_features(shapes: Shapes) -> int:
    """Return the sum over all linear layers."""
    return sum(out_features * count for (out_features, _), count in shapes.values())


def _input_features(shapes: Shapes) -> int:
    """Return the sum over all linear layers."""
    return sum(in_features * count for (_, in_features), count in shapes.values())
