# pyright: strict
"""What an engine is told: how much is computed at once, and by which means."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_core.config import is_positive, require


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much is computed at once; never what is computed.

    `token_budget`: tokens of one tick. `max_tick_seconds`: further slices stop joining a tick that is
    expected to last longer, so that cancel and admission stay quick. `job_tokens`: of one job's slices in one tick,
    where they are more than one. `num_lanes`: parts of a tick that are
    computed side by side on a CPU, each with one thread (lora_core/engine/cpu_lanes.py). `checkpoint_blocks`: whether
    ticks keep only what enters each block and compute it again in the backward: "always", "never", or "auto", where
    memory asks for it.
    `prefix_memory_bytes` and `prefix_disk_bytes`: how much is kept of what the blocks below a job's lowest adapter
    give, in the host's memory and on the disk of `prefix_folder` (lora_core/engine/prefix_cache.py); with neither
    nothing is.
    `ticks_alone`: of each size, so many ticks are given to one job by itself, so that it is known what the others cost
    it (lora_core/engine/throughput.py). `batch_invariant`: on a CPU whose products depend on their number of rows, have
    a job's bits independent of its packmates all the same (lora_core/kernels/batch_invariant.py). With AMX that takes
    about a tenth of the speed of steps of some hundred tokens, and more of smaller passes, as of answers; elsewhere
    next to nothing. Without, and on any GPU, a record says `allclose`.
    """

    token_budget: int = 1024
    max_tick_seconds: float = 1.0
    job_tokens: int = 1024
    num_lanes: int = 1
    checkpoint_blocks: Literal["auto", "always", "never"] = "auto"
    prefix_memory_bytes: int = 0
    prefix_disk_bytes: int = 0
    prefix_folder: Path | None = None
    ticks_alone: int = 0
    batch_invariant: bool = True

    def __post_init__(self) -> None:
        require(self.ticks_alone >= 0, "ticks_alone", self.ticks_alone, "at least 0")
        require(self.token_budget >= 1, "token_budget", self.token_budget, "at least 1")
        require(self.job_tokens >= 1, "job_tokens", self.job_tokens, "at least 1")
        require(self.num_lanes >= 1, "num_lanes", self.num_lanes, "at least 1")
        require(is_positive(self.max_tick_seconds), "max_tick_seconds", self.max_tick_seconds, "positive")
        known = ("auto", "always", "never")
        require(self.checkpoint_blocks in known, "checkpoint_blocks", self.checkpoint_blocks, "auto, always or never")
        for name in ("prefix_memory_bytes", "prefix_disk_bytes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or positive")
        folder_ok = self.prefix_disk_bytes == 0 or (self.prefix_folder is not None and self.prefix_folder.is_dir())
        require(folder_ok, "prefix_folder", self.prefix_folder, "a folder that exists, or prefix_disk_bytes must be 0")
