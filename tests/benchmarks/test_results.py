"""The printed table of a comparison, and the description of the machine in its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.results import Result, machine, print_table
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
