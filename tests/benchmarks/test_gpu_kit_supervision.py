"""A stage of the GPU kit that ends or blocks its process costs the later stages nothing but time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.kit import compilation, kernels, run, supervision
from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.log import Log
from benchmarks.gpu.kit.run import Stage
from benchmarks.gpu.kit.sizes import full
from benchmarks.gpu.kit.supervision import Progress, supervise
from benchmarks.workload import ROOT
from tests.benchmarks.kit_log import lines_of

CHILD = """
import faulthandler, os, sys, time
from pathlib import Path
from benchmarks.gpu.kit.log import Log
from benchmarks.gpu.kit.supervision import PROGRESS, Progress

progress = Progress.read(Path(os.environ[PROGRESS]))
names = ["one", "two", "three"] if progress.names is None else progress.names
for index, name in enumerate(names):
    progress.stage, progress.names, progress.until = name, names[index + 1:], time.monotonic()
    progress.until += 0 if "sleep" in sys.argv[2] and name == "two" else 60
    progress.suspect = "lora" if name == "two" and "lora" not in progress.left_out else ""
    progress.write()
    Log(Path(sys.argv[1]), started=progress.started).record(name, "left out", str(progress.left_out), "text")
    if progress.suspect:
        exec(sys.argv[2])
progress.stage, progress.until = "", progress.ends
progress.write()
"""


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Run three stages, of which the second executes a program while the kernels of "lora" run."""
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 8)
    monkeypatch.setattr(supervision.signal, "signal", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def supervised(program: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", CHILD, str(tmp_path), program]
        assert supervise(command, tmp_path, started=time.monotonic(), seconds=600) == 0
        return lines_of(tmp_path)

    return supervised


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("time.sleep(99)", "blocked its process"),
        (
            "faulthandler.dump_traceback_later(5, exit=True, file=progress.stack.open('w')); time.sleep(99)",
            "blocked its process",
        ),
        ("os.kill(os.getpid(), 11)", "ended its process with status -11"),
        ("os._exit(3)", "ended its process with status 3"),
    ],
    ids=["hangs", "ends itself after its deadline", "crashes", "exits"],
)
def test_stages_after_one_that_ends_or_blocks_the_process_run_without_its_kernels(
    supervised: Callable[[str], list[dict[str, Any]]], tmp_path: Path, program: str, end: str
) -> None:
    lines = supervised(program)

    assert [(line["stage"], line["value"]) for line in lines if line["name"] == "left out"] == [
        ("one", "[]"),
        ("two", "[]"),
        ("three", "['lora']"),
    ]
    (ended,) = (line for line in lines if line["name"] == "stage")
    assert (ended["stage"], ended["value"], ended["suspect"]) == ("two", end, "lora")
    assert ("sleep" in program and "dump" in program) == ("File" in ended.get("place", ""))
    assert end in (tmp_path / "kit.md").read_text()


def test_refused_options_end_the_run_with_the_status_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision.signal, "signal", lambda *_: None)

    assert supervise([sys.executable, "-c", "exit(2)"], tmp_path, started=time.monotonic(), seconds=60) == 2
    assert list(tmp_path.iterdir()) == []


def test_time_limit_during_the_imports_of_another_process_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 2)
    monkeypatch.setattr(supervision.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervision, "LEAST_SECONDS", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = """
import os, time
from pathlib import Path
from benchmarks.gpu.kit.supervision import PROGRESS, Progress
progress = Progress.read(Path(os.environ[PROGRESS]))
if progress.names is not None:
    time.sleep(99)
progress.names = ["later"]
progress.ends = progress.until = time.monotonic() + 3
progress.write()
"""

    assert supervise([sys.executable, "-c", program], tmp_path, started=time.monotonic(), seconds=60) == 0


def test_end_of_the_command_ends_the_process_of_the_stages(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "benchmarks.gpu.kit", "--quick", "--out", str(tmp_path), "--only", "facts"]
    slow = tmp_path / "torch.py"  # stands for a stage: the process never gets beyond its import
    path = tmp_path / "pid"
    slow.write_text(f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(99)")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen(program, cwd=tmp_path, env=variables) as process:
        while not (path.exists() and path.read_text()):
            assert process.poll() is None
            time.sleep(0.01)

        process.terminate()

        assert process.wait(timeout=60) == 143
    assert not Path("/proc", path.read_text()).exists()


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    monkeypatch.setattr(compilation, "LEFT_OUT", set[str]())
    for module, function in compilation.TRIALS.values():  # which a test replaces
        monkeypatch.setattr(f"{module}.{function}", getattr(import_module(module), function))
    now = time.monotonic()
    progress = Progress(path=tmp_path / "progress.json", started=now, ends=now + 100)
    return Kit(log=Log(tmp_path, started=now), sizes=full(), progress=progress)


def refuses(*_: object) -> None:
    raise RuntimeError("an illegal memory access was encountered\nmore")


def test_broken_device_ends_the_stages_of_the_process(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {name: Stage(run=lambda kit: None, share=1) for name in ("first", "second")}
    monkeypatch.setattr(run, "STAGES", stages)
    monkeypatch.setattr(torch.cuda, "synchronize", refuses)
    kit.progress.matrix_flops = 5.0

    run.run_stages(tmp_path, ["first", "second"], progress=kit.progress, quick=False)

    assert "illegal memory access" in lines_of(tmp_path)[1]["error"]
    assert kit.progress.path is not None
    left = Progress.read(kit.progress.path)
    assert (left.stage, left.names, left.left_out, left.matrix_flops) == ("", ["second"], [], 5.0)


def test_kernels_that_break_the_device_are_left_out_when_their_stage_runs_again(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    checks = {family: lambda kit, dtype, family=family: checked.append(family) for family in kernels.CHECKS}
    monkeypatch.setattr(kernels, "CHECKS", checks)
    monkeypatch.setattr(kernels, "TIMES", dict.fromkeys(kernels.CHECKS, ()))
    monkeypatch.setattr(kernels, "check_attention", lambda kit: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: refuses() if checked[-1:] == ["elementwise"] else None)
    monkeypatch.setattr(run.faulthandler, "dump_traceback_later", lambda *_, **__: None)

    run.run_stages(tmp_path, ["kernels", "stalls"], progress=kit.progress, quick=False)

    assert checked == ["lora", "elementwise"], "the device refuses all others"
    left = kit.progress
    assert (left.stage, left.names, left.left_out) == ("", ["kernels", "stalls"], ["elementwise"])

    checked.clear()
    monkeypatch.setattr(run, "STAGES", run.STAGES | {"stalls": Stage(run=lambda kit: None, share=1)})
    run.run_stages(tmp_path, ["kernels", "stalls"], progress=left, quick=False)

    assert set(checked) == set(checks) - {"elementwise"}
    assert left.names == []
    names = [line["name"] for line in lines_of(tmp_path) if line["value"] == "left out"]
    assert names == ["kernels for elementwise"]


def test_time_that_imports_took_is_not_that_of_the_first_stage(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    progress = Progress(started=now - 6000, ends=now + 4000)
    untils: list[float] = []
    stages = {name: Stage(run=lambda kit: None, share=1) for name in ("first", "second")}
    monkeypatch.setattr(run, "STAGES", stages)
    monkeypatch.setattr(run, "run_stage", lambda kit, name, stage, until: untils.append(until))

    run.run_stages(tmp_path, ["first", "second"], progress=progress, quick=True)

    assert untils == pytest.approx([now + 2000, now + 4000], abs=60)
