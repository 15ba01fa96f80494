"""Sizes of the comparisons: those of `make bench`, and `--quick`, which only checks that everything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes of all comparisons. `folder` is temporary, for logs and trainers' directories."""

    workload: Workload
    folder: Path
    repeats: int
    dtype: str = "bfloat16"
    threads: tuple[int, ...] = (1, 2)
    rivals: tuple[str, ...] = ("peft_loop", "peft_trainer", "trl_sft")
    rank: int = 16
    batch_size: int = 4
    eight_jobs: int = 8
    eight_steps: int = 20
    eight_scripts: int = 2
    """Number of scripts that are run one after another, of which half as many pairs run concurrently. The result is
    extrapolated to `eight_jobs`, since all scripts are alike."""
    inference: dict[str, int] = field(
        default_factory=lambda: {
            "adapters": 20,
            "adapter_steps": 4,
            "requests": 200,
            "peer_requests": 40,
            "max_tokens": 32,
            "job_steps": 60,
        }
    )
    """`job_steps` must suffice for the two jobs to train until the last request is answered."""

    def options(self) -> dict[str, Any]:
        """Return the options of every contender that trains."""
        return {
            "base": str(self.workload.base),
            "tokens": str(self.workload.tokens),
            "dtype": self.dtype,
            "rank": self.rank,
            "batch_size": self.batch_size,
        }

    def settings(self) -> dict[str, object]:
        """Return the settings for a results file, without paths of this machine."""
        trained = {"data": self.workload.data, "tokens_per_row": round(self.workload.num_tokens_per_row, 1)}
        shape = {"dtype": self.dtype, "rank": self.rank, "batch_size": self.batch_size, "targets": "all-linear"}
        return {"model": self.workload.model, **trained, **shape, "repeats": self.repeats}


def quick(workload: Workload, folder: Path) -> Plan:
    """Return toy sizes for a tiny base model in float32."""
    return Plan(
        workload=workload,
        folder=folder,
        repeats=1,
        dtype="float32",
        threads=(1,),
        rivals=("peft_loop",),
        rank=4,
        batch_size=2,
        eight_jobs=2,
        eight_steps=2,
        inference={
            "adapters": 2,
            "adapter_steps": 2,
            "requests": 4,
            "peer_requests": 2,
            "max_tokens": 4,
            "job_steps": 200,
        },
    )
