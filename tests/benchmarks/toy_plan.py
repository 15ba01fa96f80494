"""A plan for comparisons whose processes are replaced. Nothing reads its workload."""

from __future__ import annotations

from pathlib import Path

from benchmarks.plan import Plan, quick
from benchmarks.workload import Workload


def toy_plan(folder: Path) -> Plan:
    workload = Workload(
        base=folder,
        tokens=folder / "tokens",
        model="none",
        data="none",
        vocab_size=64,
        num_tokens_per_row=16,
        texts=[],
    )
    return quick(workload, folder)
