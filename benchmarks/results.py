"""Results of a comparison: written as JSON including raw repeats, and printed as a table."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "trl", "safetensors", "numpy"),
    *("fastapi", "starlette", "uvicorn", "pydantic", "sqlalchemy", "psycopg"),
)

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd")
"""The kernel's names of the features, on x86-64 and on ARM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One row of the table. `goal` is the minimum of `figure`, or the maximum if `is_limit`."""

    what: str
    figure: float
    unit: str
    goal: float | None = None
    is_limit: bool = False

    @property
    def is_met(self) -> bool:
        if self.goal is None:
            return True
        return self.figure <= self.goal if self.is_limit else self.figure >= self.goal

    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return f"{'at most' if self.is_limit else 'at least'} {self.goal:g}: {'met' if self.is_met else 'missed'}"


@dataclass(kw_only=True, slots=True)
class Result:
    """Raw reports and findings of a comparison. `repeats` contains the reports by contender, in order."""

    theme: str
    settings: dict[str, Any]
    repeats: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def find(
        self, what: str, figure: float, unit: str, *, goal: float | None = None, at_most: float | None = None
    ) -> None:
        """Add a finding. Its goal is either a minimum, `goal`, or a maximum, `at_most`, or there is none."""
        self.findings.append(
            Finding(
                what=what,
                figure=float(f"{figure:.4g}"),
                unit=unit,
                goal=goal if at_most is None else at_most,
                is_limit=at_most is not None,
            )
        )


def write(
    result: Result,
    folder: Path,
    *,
    note: str | None,
    load_before: float,
    module: str = "benchmarks",
) -> Path:
    """Write THEME_N-core-cpu_YYYYMM.json and return its path. A later run in the same month overwrites it.

    `module` is the command that ran.
    """
    now = datetime.now(UTC)
    content = {
        "theme": result.theme,
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": now.date().isoformat(),
        "note": note,
        "machine": machine() | {"load_before": round(load_before, 2), "load_after": round(os.getloadavg()[0], 2)},
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in PACKAGES},
        },
        **{name: value for name, value in asdict(result).items() if name != "theme"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.theme}_{psutil.cpu_count()}-core-cpu_{now:%Y%m}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return path


def machine() -> dict[str, Any]:
    """Describe this machine. `instructions` are those that decide the speed of matmuls, if the system lists them."""
    from worker.node import devices  # the machine of the GPU kit has no package `worker`

    flags = devices.cpu_flags() or ()
    return {
        "cpu": devices.processor(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def print_table(results: list[Result]) -> None:
    rows = [("", "figure", "goal")]
    for result in results:
        rows += [
            (f"{result.theme}: {finding.what}", f"{finding.figure:g} {finding.unit}".strip(), finding.verdict())
            for finding in result.findings
        ]
        rows += [(f"{result.theme}: {name}", "not run", why) for name, why in result.left_out.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def median_of(reports: list[dict[str, Any]], key: str) -> float:
    return median(report[key] for report in reports)


def rates(reports: list[dict[str, Any]], *, amount: str = "tokens", clock: str = "seconds") -> list[float]:
    """Return `amount` per second of each report."""
    return [report[amount] / report[clock] for report in reports]


def median_rate(reports: list[dict[str, Any]]) -> float:
    """Return the median rate. In total tokens over total seconds, one disturbed step would dominate."""
    return sorted(rates(reports))[len(reports) // 2]


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios within each turn, so that a disturbance of a whole turn cancels out."""
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
