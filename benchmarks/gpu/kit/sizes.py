"""Sizes of the stages, on a GPU and for a check on a CPU, and the service's constants for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.gpu.kit.load import Load
from benchmarks.gpu.kit.shapes import SHAPES, TOY, Shape

JOB_TOKENS, SLICE_TOKENS, TICK_TOKENS = 8192, 4096, 8192
"""MOST_JOB_TOKENS, SLICE_TOKENS and TICK_TOKENS of catalog/resources/memory.py for CUDA.

That module needs pydantic, which a bare machine lacks. A test compares the numbers.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Maximum tokens of a tick, of a job in a tick, and of a slice."""

    tick_tokens: int = TICK_TOKENS
    job_tokens: int = JOB_TOKENS
    slice_tokens: int = SLICE_TOKENS


SERVICE = Budgets()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of all stages.

    Attributes:
        matrix: Rows and columns of the matrices whose product gives the matmul rate.
        copy_bytes, upload_bytes: Sizes of the copies on the device and from the host.
        small, large: The base models, of 1B and 8B parameters on a GPU.
        many: The load of the comparisons, of many jobs. One job has the same rows.
        profiled_rows: Tokens of each row of the profiles of the small base model; each job has one row.
        lone_rows: Number of those rows of the job that is profiled alone.
        memory_ticks: Tokens of the ticks on the large base model whose memory is measured.
        ablated_ticks, chunks: Tokens of ticks, and labels of a chunk, that are compared with each other.
        features, tokens: Size of the tensors of the kernels' timings.
        ranks: One segment of each is in the check of the LoRA kernels.
        sequences: Lengths of the sequences in the check of attention.
        properties: Jobs of each family in the check of properties; None for all.
        repeats: Turns of each contender.
    """

    device: str
    matrix: int
    copy_bytes: int
    upload_bytes: int
    small: Shape
    large: Shape
    many: Load
    profiled_rows: int
    lone_rows: int
    memory_ticks: tuple[int, ...]
    ablated_ticks: tuple[int, ...]
    chunks: tuple[int, ...]
    features: int
    tokens: int
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    properties: tuple[str, ...] | None
    repeats: int
    budgets: Budgets = SERVICE


def full() -> Sizes:
    return Sizes(
        device="cuda:0",
        matrix=8192,
        copy_bytes=4 << 30,
        upload_bytes=256 << 20,
        small=SHAPES["1b"],
        large=SHAPES["8b"],
        many=Load(num_jobs=16, batch_size=4, shortest=32, longest=480, rank=16),
        profiled_rows=512,
        lone_rows=2,
        memory_ticks=(4096, 8192),
        ablated_ticks=(1024, 2048, 4096, 8192, 16_384, 32_768),
        chunks=(256, 512, 1024, 2048),
        features=4096,
        tokens=8192,
        ranks=(1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        sequences=(1, 2, 7, 64, 65, 127, 500, 1024, 4096),
        properties=None,
        repeats=5,
    )


def quick() -> Sizes:
    """Return toy sizes for one CPU core. The base models have two layers."""
    return Sizes(
        device="cpu",
        matrix=64,
        copy_bytes=1 << 16,
        upload_bytes=1 << 16,
        small=TOY,
        large=replace(TOY, name="toy-large"),
        many=Load(num_jobs=3, batch_size=2, shortest=8, longest=24, rank=4),
        profiled_rows=16,
        lone_rows=2,
        memory_ticks=(32, 64),
        ablated_ticks=(32, 64),
        chunks=(32, 64),
        features=64,
        tokens=8,
        ranks=(1, 4, 16),
        sequences=(1, 7, 20),
        properties=("plain", "dropout", "dpo"),
        repeats=1,
        budgets=Budgets(tick_tokens=64, job_tokens=64, slice_tokens=64),
    )
