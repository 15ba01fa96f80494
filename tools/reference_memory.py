"""The tables of memory and expected rate by base model and GPU, calculated with the planner's own functions."""

from dataclasses import dataclass, field
from typing import Any

from catalog.resources import memory
from catalog.resources.memory import BaseModelMemory, JobMemory
from catalog.resources.sharding import CARDS, CUDA_BYTES, Card, Demand, block_bytes, would_fit

RANK, LONGEST_ROW, BATCH_SIZE = 16, 2048, 8
MAX_JOBS = 16
"""Default of LORRY_MAX_JOBS_PER_TRAINER."""
SIZES = (24, 80)
"""Gigabytes of the cards in the table of jobs per trainer."""
RATED = (("L4", 24, 121e12), ("RTX 4090", 24, 165e12), ("L40S", 48, 362e12), ("A100", 80, 312e12), ("H100", 80, 989e12))
"""Name, gigabytes, and FLOP/s of dense bfloat16 matmuls with fp32 sums in the data sheet."""
PART_OF_PEAK = 0.3
"""Assumed, not measured."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes in config.json of a Llama-like decoder: gated feed-forward, grouped keys and values."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool = field(kw_only=True)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the linear layers of one block."""
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def description(self) -> dict[str, Any]:
        """As `lora_core.base_model.model.describe_base` describes a base model; biases are negligible."""
        block = sum(rows * columns for rows, columns in self.linears.values()) + 2 * self.hidden
        embeddings = (1 if self.is_tied else 2) * self.vocabulary * self.hidden
        return {
            "num_parameters": self.layers * block + embeddings + self.hidden,
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocabulary,
            "linear_shapes": {name: [list(shape), self.layers] for name, shape in self.linears.items()},
            "linear_paths": [
                {"path": f"layers.*.{name}", "shape": list(shape), "layers": list(range(self.layers))}
                for name, shape in self.linears.items()
            ],
            "blocks": {"count": self.layers, "num_parameters": self.layers * block, "largest_parameters": block},
        }


SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49_152, is_tied=True),
    Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 64, 151_936, is_tied=True),
    Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128_256, is_tied=True),
    Shape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 128, 151_936, is_tied=True),
    Shape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128_256, is_tied=True),
    Shape("Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151_936, is_tied=True),
    Shape("Llama-3.1-8B", 4096, 14_336, 32, 32, 8, 128, 128_256, is_tied=False),
    Shape("Qwen3-14B", 5120, 17_408, 40, 40, 8, 128, 151_936, is_tied=False),
    Shape("Qwen3-32B", 5120, 25_600, 64, 64, 8, 128, 151_936, is_tied=False),
    Shape("Llama-3.3-70B", 8192, 28_672, 80, 64, 8, 128, 128_256, is_tied=False),
)


def memory_of_jobs() -> str:
    """The memory of a job that trains alone, with the smallest GPUs."""
    parts = ["| Base model | Parameters | `bfloat16` | `int8` | `nf4` |", "|---|---|---|---|---|"]
    for shape in SHAPES:
        cells = [f"{memory.readable(_total(shape, how))} ({_smallest(shape, how)})" for how in ("none", "int8", "nf4")]
        count = f"{shape.description['num_parameters'] / 1e9:.2f} billion"
        parts.append(f"| {shape.name} | {count} | {' | '.join(cells)} |")
    return "\n".join(parts)


def rates() -> str:
    """The expected tokens per second of one trainer, of all its jobs together, if the base model fits in bfloat16."""
    parts = [f"| Base model | {' | '.join(name for name, _, _ in RATED)} |", "|---" * (len(RATED) + 1) + "|"]
    for shape in SHAPES:
        cells = [_rate(shape, gigabytes, flops) for _, gigabytes, flops in RATED]
        parts.append(f"| {shape.name} | {' | '.join(cells)} |")
    return "\n".join(parts)


def packs() -> str:
    """The number of jobs that fit in one trainer on common cards."""
    cards = [next(card for card in CARDS if card.gigabytes == size) for size in SIZES]
    titles = [f"{card.gigabytes} GB, {how}" for card in cards for how in ("`bfloat16`", "`nf4`")]
    parts = [f"| Base model | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for shape in SHAPES:
        counts = [str(_jobs(shape, how, card) or "no") for card in cards for how in ("none", "nf4")]
        parts.append(f"| {shape.name} | {' | '.join(counts)} |")
    return "\n".join(parts)


def cards() -> str:
    """The card sizes that the planner knows."""
    parts = ["| Size | Usable memory | Examples |", "|---|---|---|"]
    parts += [f"| {card.gigabytes} GB | {memory.readable(card.memory_bytes)} | {card.examples} |" for card in CARDS]
    return "\n".join(parts)


def _own(shape: Shape) -> int:
    """Bytes of the job in addition to its part of a tick, on a GPU, which recomputes blocks if memory is short."""
    num_parameters = shape.layers * sum(RANK * (rows + columns) for rows, columns in shape.linears.values())
    facts = JobMemory(
        num_parameters=num_parameters,
        batch_size=BATCH_SIZE,
        longest_example=LONGEST_ROW,
        lowest_rank=RANK,
        highest_rank=RANK,
    )
    return sum(facts.parts(BaseModelMemory(shape.description, "bfloat16"), recomputes=True).values())


def _total(shape: Shape, quantization: str) -> int:
    return BaseModelMemory(shape.description, "bfloat16", quantization).trainer_bytes() + _own(shape) + CUDA_BYTES


def _rate(shape: Shape, gigabytes: int, flops: float) -> str:
    """Tokens per second with two significant digits: 4 FLOPs per token and parameter for LoRA, whose base is frozen."""
    card = next(card for card in CARDS if card.gigabytes == gigabytes)
    if _total(shape, "none") > card.memory_bytes:
        return "too small"
    rate = PART_OF_PEAK * flops / (4 * shape.description["num_parameters"])
    return f"{float(f'{rate:.2g}'):,.0f}"


def _smallest(shape: Shape, quantization: str) -> str:
    """The smallest card, and groups of smaller ones. Quantized base models are not sharded."""
    shardable, gathered = block_bytes(shape.description, "bfloat16") if quantization == "none" else (0, 0)
    whole = _total(shape, quantization) - CUDA_BYTES
    found = would_fit(Demand(whole_bytes=whole, shardable_bytes=shardable, gathered_bytes=gathered))
    fits = [fit for fit in found if not fit.host_bytes]
    texts = [f"{fit.num_devices} x {fit.card.gigabytes} GB".removeprefix("1 x ") for fit in fits]
    return ", ".join(texts) or "no common GPU"


def _jobs(shape: Shape, quantization: str, card: Card) -> int:
    """The number of jobs that fit in one trainer. Those after the first one add their own memory and widen the tick."""
    left = card.memory_bytes - _total(shape, quantization)
    own, limit = _own(shape), memory.tick_tokens("cuda", num_lanes=1)
    slice_bytes = BaseModelMemory(shape.description, "bfloat16").slice_bytes()
    num_jobs = 0
    while left >= 0 and num_jobs < MAX_JOBS:
        num_jobs += 1
        left -= own + memory.widens_tick(num_jobs, tick_tokens=limit) * slice_bytes
    return num_jobs
