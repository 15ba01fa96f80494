"""Jobs of a measurement: their number, and the lengths of their rows."""

from __future__ import annotations

from dataclasses import dataclass

from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, ScheduleConfig

ENDLESS = 100_000
"""Steps of a job that is stopped from outside."""
LEARNING_RATE = 2e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """`num_jobs` jobs, each with `batch_size` rows per step of `shortest` to `longest` tokens."""

    num_jobs: int
    batch_size: int
    shortest: int
    longest: int
    rank: int

    def config(self, job: int) -> JobConfig:
        return JobConfig(
            lora=LoraConfig(rank=self.rank, alpha=2 * self.rank),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
            schedule=ScheduleConfig(kind="constant", num_steps=ENDLESS),
            batch_size=self.batch_size,
            num_steps=ENDLESS,
            seed=job,
            slice_tokens=self.largest_step,
        )

    @property
    def largest_step(self) -> int:
        """Maximum tokens of a job's step, which is one slice."""
        return self.batch_size * self.longest

    @property
    def largest_tick(self) -> int:
        return self.num_jobs * self.largest_step
