"""The printed table of a comparison, extrapolated times in it, and the description of the machine in its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eight_jobs
from benchmarks.results import Result, machine, print_table
from tests.benchmarks.toy_plan import toy_plan
from worker.node import devices


@pytest.mark.parametrize(("figure", "verdict"), [(2.0, "at least 1: met"), (0.5, "at least 1: missed")])
def test_table_says_whether_a_goal_is_met(figure: float, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(theme="any", settings={})
    result.find("ours over theirs", figure, "x", goal=1.0)

    print_table([result])

    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1)[1].endswith(verdict)


@pytest.mark.parametrize(
    ("text", "cpu", "instructions"),
    [
        (
            "model name\t: Xeon\nflags\t\t: fpu avx2 avx512f amx_bf16\nflags\t\t: avx512_bf16\n",
            "Xeon",
            ["amx_bf16", "avx512f", "avx2"],
        ),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", "aarch64", ["bf16", "asimd"]),
        (None, "aarch64", []),
    ],
)
def test_machine_is_described_as_workers_describe_it(
    text: str | None, cpu: str, instructions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.platform, "processor", lambda: "aarch64")
    if text is not None:
        devices.CPUINFO.write_text(text)

    described = machine()

    assert (described["cpu"], described["instructions"]) == (cpu, instructions)


class Script:
    """Replaces a script's process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> int:
        return 1000


def table_of(num_jobs: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    def trainer(*_: Any) -> dict[str, float]:
        return {"seconds": 10.0, "ready_seconds": 1.0, "verifying_seconds": 1.0, "peak_bytes": 1000}

    monkeypatch.setattr(eight_jobs, "Contender", Script)
    monkeypatch.setattr(eight_jobs, "_trainer", trainer)
    print_table([eight_jobs.run(replace(toy_plan(folder), eight_jobs=num_jobs, eight_scripts=2))])
    return capsys.readouterr().out


def test_extrapolated_script_times_name_the_number_of_measured_scripts(tmp_path, monkeypatch, capsys) -> None:
    table = table_of(8, tmp_path, monkeypatch, capsys)

    for name in ("scripts one after another", "scripts two at a time"):
        assert f"eight_jobs: {name.capitalize()}, extrapolated from 2: wall-clock time" in table
        assert f"eight_jobs: Speedup over {name}, extrapolated from 2" in table
    assert "jobs, extrapolated" not in table


def test_measured_script_times_have_no_extrapolation_note(tmp_path, monkeypatch, capsys) -> None:
    table = table_of(2, tmp_path, monkeypatch, capsys)

    assert "eight_jobs: Scripts one after another: wall-clock time" in table
    assert "extrapolated" not in table
