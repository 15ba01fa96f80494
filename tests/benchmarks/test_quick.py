"""`make bench` runs end to end at toy sizes. The measured values are meaningless."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import steady_state
from benchmarks.__main__ import main
from tests import tiny_base
from tests.architecture.source_files import ROOT
from tests.benchmarks.threads import ThreadContender

THEMES = (
    "steady_state",
    "warm_start",
    "submission",
    "pack_scaling",
    "loss_head",
    "frozen_prefix",
    "host_total",
    "gpu_host",
    "eight_jobs",
    "inference",
)


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
def test_cached_prefixes_give_the_losses_of_recomputed_prefixes(tmp_path: Path) -> None:
    table = quick_bench(tmp_path, "frozen_prefix")

    (path,) = (tmp_path / "out").glob("frozen_prefix_*.json")
    repeats = json.loads(path.read_text())["repeats"]
    assert [repeats["kept"][0][name] for name in ("loss", "tokens")] == [
        repeats["computed"][0][name] for name in ("loss", "tokens")
    ]
    assert repeats["kept"][0]["computed_tokens"] == repeats["kept_first"][0]["tokens"]
    assert "Speedup of a later epoch" in table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_comparison_is_written_and_printed(tmp_path: Path) -> None:
    table = quick_bench(tmp_path, *THEMES, "--explain")

    found = {json.loads(path.read_text())["theme"] for path in (tmp_path / "out").iterdir()}
    assert found == set(THEMES)
    for text in (
        "request to admission",
        "Submission to first step, new training file",
        "Jobs that Lorry admits",
        "chunked head: peak memory",
        "Speedup over scripts one after another",
        "lanes / processes",
        "Host time per linear layer and tick",
        "Speedup over PEFT, two jobs training",
    ):
        assert text in table
    shares = json.loads(next((tmp_path / "out").glob("steady_state_*.json")).read_text())["profile"]
    assert "Speedup over a plain PEFT loop, 1 thread" in table
    assert sum(share["share"] for share in shares) == pytest.approx(1, abs=0.01)
    assert {"base matmuls", "LoRA", "attention", "head and loss"} <= {share["part"] for share in shares}
    for theme in ("warm_start", "submission", "frozen_prefix", "eight_jobs"):
        (path,) = (tmp_path / "out").glob(f"{theme}_*.json")
        assert json.loads(path.read_text())["profile"], theme
    (inference,) = (tmp_path / "out").glob("inference_*.json")
    found = {finding["what"]: finding["figure"] for finding in json.loads(inference.read_text())["findings"]}
    for what in (
        "Answers that differ from the answer alone",
        "Answers that differ from PEFT",
        "Jobs that inference changed",
    ):
        assert found[what] == 0
    heads = json.loads(next((tmp_path / "out").glob("loss_head_*.json")).read_text())["repeats"]
    assert abs(heads["chunked_head"][0]["loss"] - heads["plain_head"][0]["loss"]) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the comparison is limited to AVX2")
def test_version_compared_with_itself_trains_on_the_same_tokens(tmp_path: Path) -> None:
    table = quick_bench(tmp_path, "earlier_version", "--earlier", str(ROOT))

    (path,) = (tmp_path / "out").glob("earlier_version_*.json")
    repeats = json.loads(path.read_text())["repeats"]
    assert repeats["lorry"][0]["tokens"] == repeats["earlier"][0]["tokens"]
    assert "Speedup over the earlier version" in table


@pytest.mark.parametrize("arguments", [("--only", "earlier_version"), ("--earlier", ".")])
def test_earlier_version_needs_a_checkout(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(list(arguments))

    assert "--only earlier_version and --earlier belong together" in capsys.readouterr().err


def quick_bench(folder: Path, *themes: str) -> str:
    arguments = [sys.executable, "-m", "benchmarks", *quick_arguments(folder, *themes)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def quick_arguments(folder: Path, *themes: str) -> list[str]:
    base = tiny_base.make(folder / "base")
    return ["--quick", "--base", str(base), "--out", str(folder / "out"), "--only", *themes]
