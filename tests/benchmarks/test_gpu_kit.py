"""The GPU kit at toy sizes on a CPU. The measured values are meaningless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate, gpu_kit
from benchmarks.gate import Contender
from benchmarks.gpu_kit import FULL, FULL_OPTIONS, TOY, TOY_OPTIONS, Kit, Log
from catalog.resources import memory
from tests.architecture.source_files import ROOT
from worker.process import launcher

HIDING = """
import sys

HIDDEN = {
    *("sqlalchemy", "pydantic", "pydantic_core", "psycopg", "gguf", "trl", "fastapi", "datasets", "bitsandbytes"),
    *("api", "catalog", "lorry", "worker"),
}

class Hiding:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
"""Python runs this first. A machine with torch, Triton, transformers, PEFT and accelerate may lack these packages."""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "kit.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_stage_completes_without_the_packages_of_the_service(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDING, "utf-8")
    command = [sys.executable, "-m", "benchmarks.gpu_kit", "--quick", "--seconds", "1500", "--out", str(tmp_path)]
    variables = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)

    lines = lines_of(tmp_path)
    assert [line for line in lines if line["value"] == "failed"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line["value"] for line in lines if line["stage"] == "correctness"]
    assert len(tests) > 10
    assert set(tests) == {"SKIPPED"}
    losses = {line["name"].split(": ")[1].partition(",")[0]: line["loss"] for line in lines if "loss" in line}
    assert losses.keys() == {"Lorry", "PEFT in a loop", "PEFT with Trainer"}
    assert max(losses.values()) - min(losses.values()) < 0.01
    assert {line["stage"] for line in lines} == {"correctness", "ceilings", "compare", "profile", "stalls"}
    assert "toy: Lorry, 1 job over PEFT in a loop" in (tmp_path / "kit.md").read_text("utf-8")


def test_kit_without_a_gpu_exits_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_kit, "has_gpu", lambda: False)

    status = gpu_kit.main(["--out", str(tmp_path / "out")])

    assert status == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_process_that_blocks_ends_at_its_limit_with_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    program = "import time; print('begun', flush=True); time.sleep(3600)"

    def blocked(_command: list[str], **options: Any) -> subprocess.Popen[str]:
        process = popen([sys.executable, "-c", program], **options)
        assert process.stdout is not None
        process.stdout.readline()  # after its start, Python handles the signal
        return process

    monkeypatch.setattr(gate.subprocess, "Popen", blocked)
    contender = Contender("blocked", threads=1, log=tmp_path / "log", patience_seconds=0.01)

    with pytest.raises(RuntimeError, match="most recent call first"):
        contender.step()

    contender.close()


class Stopping:
    """A contender that takes three steps, and then fails."""

    def __init__(self, name: str, **_: Any) -> None:
        self._num_steps = 0

    def step(self) -> dict[str, float]:
        self._num_steps += 1
        if self._num_steps > 3:
            raise RuntimeError("an illegal memory access")
        return {"tokens": 10.0 * self._num_steps, "seconds": 1.0, "loss": float("nan")}

    def close(self) -> None:
        pass


def test_failure_is_recorded_and_earlier_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kit, "Contender", Stopping)
    log = Log(tmp_path)

    Kit(log, TOY_OPTIONS, TOY, ends=float("inf"), repeats=5).run(["compare"])

    lines = lines_of(tmp_path)
    assert log.has_failed
    assert sum(line["value"] == "failed" for line in lines) == len(gpu_kit.CONTENDERS)
    assert [(line["value"], line["loss"]) for line in lines if line["name"] == "toy: Lorry, step 2"] == [(30.0, "nan")]


def test_stages_after_the_time_limit_are_recorded_as_not_run(tmp_path: Path) -> None:
    Kit(Log(tmp_path), TOY_OPTIONS, TOY, ends=0.0, repeats=1).run(["profile"])

    (line,) = lines_of(tmp_path)
    assert line["why"] == "the time limit had passed"


def test_constants_are_those_of_the_service() -> None:
    names = {"tick_tokens": "TICK_TOKENS", "job_tokens": "MOST_JOB_TOKENS", "slice_tokens": "SLICE_TOKENS"}

    assert {name: FULL_OPTIONS[name] for name in names} == {
        name: getattr(memory, constant)["cuda"] for name, constant in names.items()
    }
    assert launcher.CUDA == gate.GPU_VARIABLES | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_parameters_of_the_blocks_are_those_of_llama_3() -> None:
    embedding = FULL["8B"].vocab * FULL["8B"].hidden

    assert FULL["8B"].block_parameters + 2 * embedding == pytest.approx(8.03e9, rel=1e-3)
    assert FULL["1B"].block_parameters + FULL["1B"].vocab * FULL["1B"].hidden == pytest.approx(1.236e9, rel=1e-3)
