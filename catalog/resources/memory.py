"""Estimates memory for placing jobs: of a base model in a trainer, and of a job in addition to it. Pure; all results in
bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from catalog.spec.lora import begins_with_the_base
from catalog.spec.methods import compares_with_start
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


@dataclass(frozen=True, slots=True)
class BaseModelMemory:
    """Memory of a base model in a trainer, and of the ticks that use it.

    A job is accepted before its trainer is known, and its needs assume the kernels of a CPU.
    """

    description: Mapping[str, Any]
    """Lora_core's description of the base model."""
    precision: str
    quantization: str = "none"
    kernels: ElementwiseKernels | None = None
    """Those of the trainer. None: no trainer has it yet."""

    @property
    def width(self) -> int:
        """Bytes of a value in the precision of the base model."""
        return BYTES_PER_NUMBER[self.precision]

    @property
    def shapes(self) -> Shapes:
        return self.description.get("linear_shapes", {})

    @property
    def output_features(self) -> int:
        """The sum over all linear layers."""
        return sum(out_features * count for (out_features, _), count in self.shapes.values())

    @property
    def input_features(self) -> int:
        """The sum over all linear layers."""
        return _input_features(self.shapes)

    def weight_bytes(self) -> int:
        """Return the bytes of the frozen weights. Quantization covers the linear layers that an adapter may target, but
        not embeddings, norms and the head."""
        num_parameters = int(self.description.get("num_parameters", 0))
        if self.quantization == "none":
            return num_parameters * self.width
        matrices = self._matrices()
        num_quantized = sum(rows * columns * count for (rows, columns), count in matrices.items())
        of_matrix = {"nf4": _nf4_bytes, "int8": _int8_bytes}[self.quantization]
        quantized = sum(of_matrix(rows, columns) * count for (rows, columns), count in matrices.items())
        return quantized + max(0, num_parameters - num_quantized) * self.width

    def trainer_bytes(self) -> int:
        """Return the memory of a trainer before its first job: the base model and a tick with the tokens of one job."""
        return self.weight_bytes() + self.tick_bytes(JOB_TOKENS)

    def tick_bytes(self, num_tokens: int) -> int:
        """Return the sum of `tick_parts`."""
        return sum(self.tick_parts(num_tokens).values())

    def tick_parts(self, num_tokens: int) -> dict[str, int]:
        """Return the parts of a tick of `num_tokens`: activations, and one chunk of logits (fp32, with their gradient).

        For a quantized base model also the weights of its largest linear layer, which are dequantized for each matmul.
        """
        restored = 0
        if self.quantization != "none":
            restored = max((rows * columns for rows, columns in self._matrices()), default=0) * self.width
        return {
            "activations": num_tokens * self.activation_bytes_per_token(),
            "logits": 2 * 4 * LOGIT_CHUNK_ROWS * int(self.description.get("vocab_size", 0)),
            "restored_weights": restored,
        }

    def slice_bytes(self) -> int:
        """Return the activations that one more job adds to a tick that is below its maximum size."""
        return JOB_TOKENS * self.activation_bytes_per_token()

    def activation_bytes_per_token(self) -> int:
        """Return the activations that one token of a tick keeps until its backward pass.

        Each linear layer's output is kept by what reads it: attention, the gated activation, or the next norm, after
        the residual sum. Each input is kept for the gradient of A, once if several layers share it. The kernels of a
        GPU do not keep RECOMPUTED_INPUTS. Single torch operations keep them, silu(gate), and the residual sum in fp32,
        of which a norm makes a copy unless the sum is fp32 already. A job with dropout also needs
        MASK_BYTES_PER_FEATURE.
        """
        shapes, kernels = self.shapes, self.kernels or "cpu"
        others = {name for names in SHARED_INPUTS if names[0] in shapes for name in names[1:]}
        inputs = _input_features({name: shape for name, shape in shapes.items() if name not in others})
        if kernels != "cpu" and shapes.keys() >= set(GATED_MLP):
            if kernels == "cuda":
                inputs -= _input_features({name: shapes[name] for name in RECOMPUTED_INPUTS if name in shapes})
            else:  # silu(gate), and of each norm an fp32 copy of its input, in place of the half as large input
                copied = RECOMPUTED_INPUTS if self.width < 4 else ("down_proj",)
                inputs += _input_features({name: shapes[name] for name in copied if name in shapes})
        return (self.output_features + inputs) * self.width

    def recomputed_bytes_per_token(self) -> int:
        """Return the activations per token with recomputation, on a GPU: the inputs of all blocks, and all of one
        block."""
        num_layers = max(1, int(self.description.get("num_layers", 1)))
        entering = num_layers * int(self.description.get("hidden_size", 0)) * self.width
        return entering + math.ceil(self.activation_bytes_per_token() / num_layers)

    def decomposition_bytes(self) -> int:
        """Return the memory to decompose the largest weight: in fp32, with the copy that LAPACK overwrites, both
        factors and its workspace."""
        cast = 0 if self.precision == "float32" else 1
        sizes = ((2 + cast) * rows * columns + min(rows, columns) ** 2 for rows, columns in self._matrices())
        return 4 * max(sizes, default=0)

    def samples_bytes(self, samples: Mapping[str, Any] | None) -> int:
        """Return the memory of one pass that answers all sample prompts, and of the keys and values of all its tokens.

        The pass keeps nothing for a backward pass. If no linear layer is named `k_proj`, keys have `hidden_size`
        features. A prompt is assumed to have at most one token per character; tokens of the chat template are not
        counted.
        """
        if samples is None:
            return 0
        num_tokens = sum(len(prompt) + int(samples["max_tokens"]) for prompt in samples["prompts"])
        shapes = self.shapes
        widest = max((max(shape) for shape, _ in shapes.values()), default=0)
        features = shapes["k_proj"][0][0] if "k_proj" in shapes else int(self.description.get("hidden_size", 0))
        kept = 2 * features * int(self.description.get("num_layers", 0))
        return num_tokens * (widest * PASSING_NUMBERS_PER_FEATURE + kept) * self.width

    def _matrices(self) -> Counter[tuple[int, int]]:
        """Count the linear layers that quantization covers, by (out_features, in_features)."""
        return Counter((linear.out_features, linear.in_features) for linear in linears_of(self.description))


@dataclass(frozen=True, kw_only=True, slots=True)
class JobMemory:
    """The facts about a job that decide its memory."""

    num_parameters: int
    """Trained parameters."""
    dropout: float = 0.0
    keeps_best: bool = False
    keeps_parent: bool = False
    """Whether the loss compares with the parent adapter, whose weights are then in memory too."""
    use_dora: bool = False
    init_lora_weights: str | None = None
    batch_size: int = 1
    longest_example: int | None = None
    """Tokens of its longest row or pair of rows, which is never split. None if unknown."""
    samples: Mapping[str, Any] | None = None
    optimizer: str = "adamw"
    lowest_rank: int = 1
    highest_rank: int = 1
    slice_tokens: int = SLICE_TOKENS["cpu"]
    """Maximum tokens of a slice, unless a row is longer."""

    @classmethod
    def of_spec(
        cls,
        spec: Mapping[str, Any],
        *,
        num_parameters: int,
        longest_example: int | None = None,
        has_parent: bool = False,
    ) -> JobMemory:
        """Return the facts about a job with a resolved specification. `num_parameters`: of its adapter."""
        lora, evaluation = spec["lora"], spec["evaluation"]
        by_pattern: Mapping[str, int] = lora.get("rank_pattern") or {}
        ranks = [int(lora["rank"]), *by_pattern.values()]
        return cls(
            num_parameters=num_parameters,
            dropout=float(lora.get("dropout") or 0),
            keeps_best=evaluation.get("keep") == "best",
            keeps_parent=has_parent and compares_with_start(spec.get("method", "supervised")),
            use_dora=bool(lora.get("use_dora")),
            init_lora_weights=lora.get("init_lora_weights"),
            batch_size=int(spec["batch_size"]),
            longest_example=longest_example,
            samples=evaluation.get("samples"),
            optimizer=spec["optimizer"].get("type", "adamw"),
            lowest_rank=min(ranks),
            highest_rank=max(ranks),
            slice_tokens=int(spec.get("slice_tokens") or SLICE_TOKENS["cpu"]),
        )

    def row_bytes(self, precision: str) -> int:
        """Return the bytes of the adapter state: weights, gradient and optimizer state, all fp32.

        If the base model is not fp32, a copy of the weights in its precision is included. Adafactor stores in + out +
        2r values for the r · (in + out) parameters of a layer, and out more with DoRA. A useful r is at most half of in
        + out, so 3/r of the parameters is enough: rank 16 takes 9 bytes per parameter instead of 16, plus the copy.
        """
        number = self.num_parameters
        copy_bytes = 0 if precision == "float32" else BYTES_PER_NUMBER[precision]
        vectors = 4 * number * VECTORS_PER_ROW
        if self.optimizer == "adafactor":
            vectors = 4 * (2 * number + min(2 * number, math.ceil(3 * number / self.lowest_rank)))
        return vectors + copy_bytes * number

    def parts(self, base: BaseModelMemory, *, recomputes: bool = False) -> dict[str, int]:
        """Return the memory of the job itself on any device, without its part of a tick, by part (see `gpus.PARTS`).

        - `row`: the adapter state.
        - `best_weights`: a copy of the weights, if the job keeps the best ones.
        - `dora`: a norm and a factor of each output, for all linear layers of the base model (an upper bound).
        - `subtracted_start`: the initial weights that PiSSA and OLoRA subtract, in the precision of the base model.
        - `slice_gradients`: gradient buffers of the slices after the first, if a step may have more than one slice.
        - `lora_products`: A x of each token of the largest slice, padded as by the kernels of a GPU.
        - `beyond_a_slice`: the largest of three phases that never overlap, minus a slice of JOB_TOKENS: the computation
          of the initial weights, the largest slice (with dropout masks and the outputs that DoRA scales, for all linear
          layers), and the pass for the samples.

        The reference pass of a preference loss keeps nothing for a backward pass and is over before the job's own pass
        begins. `recomputes`: whether the engine recomputes activations when memory is short, as it does on a GPU. A
        long slice then keeps the inputs of the blocks, one block at a time, and still the values of LoRA, DoRA and
        dropout. If no trainer has the base yet, the job's largest slice runs with the kernels of the device, and
        JOB_TOKENS with those of a CPU.
        """
        width, number = base.width, self.num_parameters
        subtracts_start = begins_with_the_base(self.init_lora_weights)
        step_tokens = self.batch_size * self.longest_example if self.longest_example else math.inf
        most_tokens = int(max(JOB_TOKENS, self.longest_example or 0, min(self.slice_tokens, step_tokens)))
        beyond = max(
            self._largest_slice_bytes(base, most_tokens, recomputes=recomputes),
            base.decomposition_bytes() if subtracts_start else 0,
            base.samples_bytes(self.samples),
        )
        return {
            "row": self.row_bytes(base.precision),
            "best_weights": 4 * number if self.keeps_best else 0,
            "parent": (4 if base.precision == "float32" else 4 + width) * number if self.keeps_parent else 0,
            "dora": 2 * 4 * base.output_features if self.use_dora else 0,
            "subtracted_start": 2 * number * width if subtracts_start else 0,
            "slice_gradients": 0 if step_tokens <= self.slice_tokens else FURTHER_SLICES * 4 * number,
            "lora_products": most_tokens * self._sum_of_ranks(base) * width,
            "beyond_a_slice": beyond - base.slice_bytes(),
        }

    def _largest_slice_bytes(self, base: BaseModelMemory, num_tokens: int, *, recomputes: bool) -> int:
        # The kernels of a GPU draw a mask again instead of keeping it.
        has_masks = self.dropout and not (recomputes and self._fits_gpu_kernels(base.precision))
        kept = num_tokens * base.input_features * MASK_BYTES_PER_FEATURE if has_masks else 0
        kept += num_tokens * base.output_features * base.width if self.use_dora else 0
        on_device = base if base.kernels else replace(base, kernels="cuda" if recomputes else "cpu")
        largest = num_tokens * on_device.activation_bytes_per_token()
        if recomputes:
            recomputed = num_tokens * on_device.recomputed_bytes_per_token()
            largest = max(base.slice_bytes(), min(largest, recomputed))
        return largest + kept

    @property
    def _rank_factor(self) -> int:
        """PiSSA and OLoRA subtract their initial weights, which doubles the rank."""
        return 2 if begins_with_the_base(self.init_lora_weights) else 1

    def _fits_gpu_kernels(self, precision: str) -> bool:
        """Return whether the LoRA kernels of a GPU take the job; see lora_core/layers/tiled_lora.py."""
        return not self.use_dora and precision != "float32" and self._rank_factor * self.highest_rank <= GPU_KERNEL_RANK

    def _sum_of_ranks(self, base: BaseModelMemory) -> int:
        """Return an upper bound of the sum of the ranks of the job's linear layers, from its number of parameters,
        padded if the kernels of a GPU take them."""
        shapes, factor = base.shapes, self._rank_factor
        lowest, highest = factor * self.lowest_rank, factor * self.highest_rank
        num_layers = sum(count for _, count in shapes.values())
        narrowest = min((sum(shape) for shape, _ in shapes.values()), default=1)
        ranks = factor * min(self.highest_rank * num_layers, self.num_parameters // narrowest)
        if not self._fits_gpu_kernels(base.precision):
            return ranks
        padding = kernel_width(lowest) / lowest
        if lowest < highest:
            padding = max(2, padding)  # above the first width, a padded rank is less than twice as high
        return min(num_layers * kernel_width(highest), math.ceil(ranks * padding))


def kernel_width(rank: int) -> int:
    """Return the numbers of A x that the kernels of a GPU keep for a rank of at most GPU_KERNEL_RANK."""
    return next(width for width in KERNEL_WIDTHS if width >= rank)


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


def readable(num_bytes: float) -> str:
    """Return a size in decimal units for a sentence: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _nf4_bytes(out_features: int, in_features: int) -> int:
    """Return half a byte per weight and the double-quantized scales: about 0.516 bytes per weight of a large matrix."""
    blocks = math.ceil(out_features * in_features / NF4_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NF4_SCALE_BLOCK)
    return math.ceil(out_features * in_features / 2) + scales + NF4_TABLE_BYTES


def _int8_bytes(out_features: int, in_features: int) -> int:
    """Return one byte per weight, and four bytes per row for its scale."""
    return out_features * in_features + 4 * out_features


def _input_features(shapes: Shapes) -> int:
    """Return the sum over these linear layers."""
    return sum(in_features * count for (_, in_features), count in shapes.values())
