"""The kit compiles kernels in processes of their own, and does without those whose trial makes the GPU unusable."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.kit import compilation, kernels, run
from benchmarks.gpu.kit.compilation import TRIALS, Job, Running, jobs, leave_out, left_out, run_jobs
from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.log import Log
from benchmarks.gpu.kit.sizes import full, quick
from lora_core.kernels import selection
from lora_core.kernels.gpu import attention_trial, decoding_trial, elementwise_trial, trials
from lora_core.kernels.selection import AttentionHeads, choose_kernels
from tests.benchmarks.kit_log import lines_of
from tests.lora_core.kernels.gpu.triton_folder import environment
from tests.services.programs import Missing

CUDA = torch.device("cuda:0")


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    monkeypatch.setattr(compilation, "LEFT_OUT", set[str]())
    for module, function in ((trials, "why_lora_differs"), (elementwise_trial, "why_trial_failed")):
        monkeypatch.setattr(module, function, lambda *_, **__: None)
    monkeypatch.setattr(attention_trial, "why_attention_differs", lambda *_, **__: None)
    monkeypatch.setattr(decoding_trial, "why_decoding_differs", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return Kit(log=Log(tmp_path, started=time.monotonic()), sizes=quick(), stage="compilation")


def test_every_trial_of_an_engine_and_of_the_kit_is_a_job() -> None:
    families = [job[0] for job in jobs()]

    assert set(families) == set(TRIALS)
    assert set(kernels.CHECKS) == set(kernels.TIMES) == set(TRIALS) - {"random"}, "its trial checks every number"
    assert {job[1:] for job in jobs() if job[0] == "lora"} == {("bfloat16", str(i)) for i in range(len(trials.TRIED))}
    dtypes = {str(dtype).removeprefix("torch.") for dtype in elementwise_trial.TOLERANCE}
    assert {job[1] for job in jobs() if job[0] == "elementwise"} == dtypes
    assert len(set(jobs())) == len(jobs())


def test_job_reports_why_its_kernels_cannot_be_used(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    arguments = {"lora": ["0"], "attention": ["16", "capped"], "decoding": ["16", "capped"]}
    run_jobs(kit, [(family, "float32", *arguments.get(family, [])) for family in TRIALS])

    reasons = {line["name"].split()[3]: line["reason"] for line in lines_of(tmp_path)}
    assert set(reasons) == set(TRIALS)
    assert all("Triton is not installed (hidden)" in reason for reason in reasons.values())
    assert left_out() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "job",
    [
        ("lora", "float32", "1"),
        ("attention", "float32", "16", "uncapped"),
        ("decoding", "float32", "16", "uncapped"),
    ],
)
def test_job_tries_its_kernels(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    try:
        interpreter = environment(TRITON_INTERPRET="1")
    except Missing as missing:
        pytest.skip(str(missing))
    for name, value in interpreter.items():
        monkeypatch.setenv(name, value)

    run_jobs(kit, [job])

    (line,) = lines_of(tmp_path)
    assert line.keys() == {"second", "stage", "name", "value", "unit"}, "it has neither a reason nor an error"


ENDS = {
    "lora": 'print("compiling"); print(\'{"fault": "CUDA error: misaligned address"}\'); print("a warning")',
    "attention": "import os; os.kill(os.getpid(), 11)",
    "elementwise": "raise SystemExit('no module named lora_core')",
    "random": "import os; os.kill(os.getpid(), 9)",
}


def test_families_whose_trial_faults_are_left_out_by_the_engines(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "command", lambda kit, job: [sys.executable, "-c", ENDS[job[0]]])
    monkeypatch.setattr(selection, "varlen_parameters", lambda: selection.VARLEN_PARAMETERS)

    run_jobs(kit, [(family, "bfloat16") for family in ENDS])

    lines = {line["name"].split()[3]: line for line in lines_of(tmp_path)}
    assert lines["lora"]["fault"] == "CUDA error: misaligned address"
    assert lines["attention"]["fault"].startswith("status -11")
    assert lines["elementwise"]["error"] == "status 1: no module named lora_core"
    assert lines["random"]["error"].startswith("status -9"), "the system may have run out of memory"
    assert left_out() == ["attention", "lora"]
    chosen = choose_kernels(CUDA, torch.bfloat16, AttentionHeads(size=64, is_capped=True))
    assert (chosen.lora, chosen.tiled_head_size, chosen.elementwise) == ("loop", None, "compiled")
    assert sorted(reason for reason in chosen.reasons if "earlier check" in reason) == [
        "an earlier check of attention made the device unusable or did not end",
        "an earlier check of lora made the device unusable or did not end",
    ]


def test_kernels_that_are_left_out_are_not_checked(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit(log=kit.log, sizes=full(), stage="kernels")
    ran: list[str] = []
    monkeypatch.setattr(kernels, "check_attention", lambda kit: None)
    checks = {family: lambda kit, dtype, family=family: ran.append(family) for family in TRIALS}
    times = {family: (lambda kit, family=family: ran.append(family),) for family in TRIALS}
    for parts in times.values():
        parts[0].__name__ = "times"
    monkeypatch.setattr(kernels, "CHECKS", checks)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kernels, "TIMES", times)
    leave_out(["lora"])

    kernels.kernels(kit)

    assert set(ran) == set(TRIALS) - {"lora"}
    assert [line["name"] for line in lines_of(tmp_path) if line["value"] == "left out"] == ["kernels for lora"]


def test_jobs_end_with_their_stage(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LEAST_SECONDS", 5)
    start, started = compilation._started, list[Running]()  # pyright: ignore[reportPrivateUsage]

    def start_and_record(kit: Kit, job: Job) -> Running:
        started.append(start(kit, job))
        return started[-1]

    monkeypatch.setattr(compilation, "_started", start_and_record)
    monkeypatch.setattr(compilation, "command", lambda kit, job: [sys.executable, "-c", "import time; time.sleep(99)"])

    run.run_stage(kit, "compilation", lambda kit: run_jobs(kit, [("lora",)]), until=time.monotonic())

    assert [line["value"] for line in lines_of(tmp_path)] == ["stopped", "stopped at its deadline"]
    assert left_out() == []
    assert [each.process.wait(60) for each in started] == [-signal.SIGKILL]


def test_family_whose_trial_does_not_end_is_left_out(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LEAST_SECONDS", 5)
    monkeypatch.setattr(compilation, "ENDLESS_SECONDS", 0.1)
    monkeypatch.setattr(compilation, "command", lambda kit, job: [sys.executable, "-c", "import time; time.sleep(99)"])

    run.run_stage(kit, "compilation", lambda kit: run_jobs(kit, [("lora",)]), until=time.monotonic())

    assert left_out() == ["lora"]
    assert choose_kernels(CUDA, torch.bfloat16).lora == "loop"
