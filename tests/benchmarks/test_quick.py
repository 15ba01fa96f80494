"""`make bench` runs end to end at toy sizes. The measured values are meaningless."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import steady_state
from benchmarks.__main__ import main
from tests import tiny_base
from tests.architecture.source_files import ROOT
from tests.benchmarks.threads import ThreadContender

THEMES = ("steady_state", "eight_jobs", "inference")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised inside PEFT
def test_contenders_get_the_same_rows_and_compute_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steady_state, "Contender", ThreadContender)

    main(quick_arguments(tmp_path, "steady_state"))

    (path,) = (tmp_path / "out").glob("steady_state_*.json")
    repeats = json.loads(path.read_text())["repeats"]
    (ours,), (theirs,) = repeats["lorry_1"], repeats["peft_loop_1"]
    assert (ours["tokens"], ours["labels"]) == (theirs["tokens"], theirs["labels"])
    assert abs(ours["loss"] - theirs["loss"]) < 0.01
    assert "Speedup over a plain PEFT loop, 1 thread" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_comparison_is_written_and_printed(tmp_path: Path) -> None:
    table = quick_bench(tmp_path, *THEMES)

    found = {
        json.loads(path.read_text())["theme"]: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()
    }
    assert found.keys() == set(THEMES)
    for text in (
        "Speedup over a plain PEFT loop, 1 thread",
        "Speedup over scripts one after another",
        "Speedup over PEFT, two jobs training",
    ):
        assert text in table
    figures = {finding["what"]: finding["figure"] for finding in found["inference"]["findings"]}
    for what in (
        "Answers that differ from the answer alone",
        "Answers that differ from PEFT",
        "Jobs that inference changed",
    ):
        assert figures[what] == 0


def quick_bench(folder: Path, *themes: str) -> str:
    arguments = [sys.executable, "-m", "benchmarks", *quick_arguments(folder, *themes)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def quick_arguments(folder: Path, *themes: str) -> list[str]:
    base = tiny_base.make(folder / "base")
    return ["--quick", "--base", str(base), "--out", str(folder / "out"), "--only", *themes]
