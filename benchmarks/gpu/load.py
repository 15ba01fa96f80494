"""Training data: rows of random tokens of equal or different lengths. The second half of each row is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, ScheduleConfig
from lora_core.data.token_dataset import TokenDataset

ENDLESS = 100_000
"""Steps of a job that is stopped from outside."""
LEARNING_RATE = 2e-4
NUM_ROWS = 256


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

    def rows(self, vocab: int) -> TokenDataset:
        """Return the rows, the same for every job and contender."""
        numbers = np.random.default_rng(0)
        lengths = numbers.integers(self.shortest, self.longest + 1, NUM_ROWS)
        masks = [(np.arange(length) >= length // 2).astype(np.uint8) for length in lengths]
        return TokenDataset(
            input_ids=numbers.integers(0, vocab, int(lengths.sum()), dtype=np.int32),
            loss_mask=np.concatenate(masks),
            row_offsets=np.cumsum([0, *lengths]),
        )
