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
    explains: bool = True
    """Profile comparisons that miss a goal."""
    dtype: str = "bfloat16"
    threads: tuple[int, ...] = (1, 2)
    rivals: tuple[str, ...] = ("peft_loop", "peft_trainer", "trl_sft")
    rank: int = 16
    batch_size: int = 4
    pack_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    pack_tokens: int = 64
    pack_rank: int = 8
    pack_warm_up: int = 9
    """Steps of each size that are not measured: until the trials of the head's row counts have ended (`UNTRIED_TIMES`
    of lora_core/kernels/batch_invariant.py)."""
    lanes: tuple[int, ...] = (1, 2)
    head: dict[str, int] = field(
        default_factory=lambda: {"num_labels": 1024, "num_features": 576, "vocab_size": 151_936}
    )
    upper_share: float = 0.2
    prefix_rows: int = 32
    eight_jobs: int = 8
    eight_steps: int = 20
    eight_scripts: int = 2
    """Number of scripts that are run one after another, of which half as many pairs run concurrently. The result is
    extrapolated to `eight_jobs`, since all scripts are alike."""
    idle_seconds: float = 20.0
    host_jobs: int = 4
    slices: tuple[int, ...] = (1024, 512, 256)
    host_tick_jobs: int = 16
    host_ticks: int = 600
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
        explains=False,
        dtype="float32",
        threads=(1,),
        rivals=("peft_loop",),
        rank=4,
        batch_size=2,
        pack_sizes=(1, 2),
        pack_tokens=16,
        pack_rank=2,
        pack_warm_up=1,
        lanes=(1,),
        head={"num_labels": 64, "num_features": 64, "vocab_size": 4096},
        upper_share=0.5,
        prefix_rows=4,
        eight_jobs=2,
        eight_steps=2,
        idle_seconds=0.5,
        host_jobs=2,
        slices=(512,),
        host_tick_jobs=2,
        host_ticks=2,
        inference={
            "adapters": 2,
            "adapter_steps": 2,
            "requests": 4,
            "peer_requests": 2,
            "max_tokens": 4,
            "job_steps": 200,
        },
    )
