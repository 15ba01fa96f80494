# pyright: strict
"""Configuration of an engine: how much it computes at once, and how."""

from dataclasses import dataclass
from typing import Literal

from lora_core.config import is_positive, require


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Settings that change the speed and memory use of an engine, but not the result of a job (see `batch_invariant`).

    Attributes:
        token_budget: Maximum tokens of one tick.
        max_tick_seconds: Expected duration beyond which no further slices join a tick, so that cancellation and
            admission stay responsive.
        job_tokens: Maximum tokens of one job in a tick, if it has more than one slice in it.
        job_slices: Maximum slices of one job in a tick on one rank. Each after the first needs memory for a gradient.
        num_lanes: CPU threads that compute parts of a tick concurrently (lora_core/runtime/cpu_lanes.py).
        checkpoint_blocks: Activation checkpointing per block: "always", "never", or "auto", which enables it when
            memory is scarce.
        ticks_alone: Number of ticks of each size that one job gets alone, to measure how much packmates slow it down
            (lora_core/engine/throughput.py).
        batch_invariant: On a CPU whose matmuls depend on the number of rows, keep the bits of a job independent of
            its packmates (lora_core/kernels/batch_invariant.py). With AMX this costs about 10% of the speed of steps
            of several hundred tokens, and more in small passes such as generation. Elsewhere it is almost free. If
            disabled, and on any GPU, the determinism level is `allclose`.

    Raises:
        ConfigError: A value is out of range.
    """

    token_budget: int = 1024
    max_tick_seconds: float = 1.0
    job_tokens: int = 1024
    job_slices: int | None = None
    num_lanes: int = 1
    checkpoint_blocks: Literal["auto", "always", "never"] = "auto"
    ticks_alone: int = 0
    batch_invariant: bool = True

    def __post_init__(self) -> None:
        require(self.ticks_alone >= 0, "ticks_alone", self.ticks_alone, "at least 0")
        require(self.token_budget >= 1, "token_budget", self.token_budget, "at least 1")
        require(self.job_tokens >= 1, "job_tokens", self.job_tokens, "at least 1")
        require(self.job_slices is None or self.job_slices >= 1, "job_slices", self.job_slices, "at least 1")
        require(self.num_lanes >= 1, "num_lanes", self.num_lanes, "at least 1")
        require(is_positive(self.max_tick_seconds), "max_tick_seconds", self.max_tick_seconds, "positive")
        known = ("auto", "always", "never")
        require(self.checkpoint_blocks in known, "checkpoint_blocks", self.checkpoint_blocks, "auto, always or never")
