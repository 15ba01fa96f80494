"""How a trainer is started: without secrets, and tied to its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from lorry.local.parent_watch import LOST_PARENT, dying_with_parent
from worker.node import devices
from worker.process import launcher
from worker.process.confined_child import OPTION, confined
from worker.process.launcher import (
    NICENESS,
    TrainerProcess,
    child_environment,
    launch,
    trainer_argv,
    trainer_environment,
)
from worker.process.sandbox import Sandbox
from worker.protocol.mailbox import TrainerDirectory

ROOT = Path(__file__).parents[3]
GPU = devices.Device(kind="cuda", indices=(0,), name="GPU", memory_bytes=1)
HOLDER = (
    "import sys, threading; from worker.process import confined_child; "
    "confined_child.exit_without_parent(sys.argv); threading.Event().wait()"
)


def test_no_secret_of_the_worker_reaches_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("LORRY_PEPPER", "LORRY_DATABASE_URL", "LORRY_REDIS_URL", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, "canary")

    environment = trainer_environment(tmp_path, devices.cpu(), num_threads=2)

    assert "canary" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


def test_tuning_variables_of_libraries_pass_and_credentials_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = {"NVIDIA_VISIBLE_DEVICES", "NCCL_IB_PKEY", "CUDA_MODULE_LOADING", "TORCH_LOGS"}
    tuning |= {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CC"}
    credentials = {"NVIDIA_API_KEY", "TORCH_HUB_TOKEN", "CUDA_SECRET", "NCCL_password", "NVIDIA_CREDENTIALS"}
    for name in tuning | credentials:
        monkeypatch.setenv(name, "canary")

    passed = {name for name, value in child_environment(with_hub=True).items() if value == "canary"}

    assert passed & (tuning | credentials) == tuning


def test_only_a_child_that_downloads_has_the_hubs_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")

    assert "HF_TOKEN" not in child_environment()
    assert child_environment(with_hub=True)["HF_TOKEN"] == "canary"


def test_a_trainer_sees_only_its_own_gpus(tmp_path: Path) -> None:
    gpu = devices.Device(kind="cuda", indices=(3,), uuids=("GPU-d",), name="GPU", memory_bytes=1)
    several = devices.Device(kind="cuda", indices=(2, 0), uuids=("GPU-c", "GPU-a"), name="GPUs", memory_bytes=2)

    on_gpu = trainer_environment(tmp_path, gpu, num_threads=1)
    on_cpu = trainer_environment(tmp_path, devices.cpu(), num_threads=1)

    assert (on_gpu["CUDA_VISIBLE_DEVICES"], on_gpu["CUDA_DEVICE_ORDER"]) == ("GPU-d", "PCI_BUS_ID")
    assert on_gpu["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert (on_gpu["CUBLAS_WORKSPACE_CONFIG"], on_gpu["TORCH_CUDNN_SDPA_DEPRIORITIZED"]) == (":4096:8", "1")
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert trainer_environment(tmp_path, several, num_threads=1)["CUDA_VISIBLE_DEVICES"] == "GPU-c,GPU-a"


def test_a_trainer_that_survives_a_kill_is_left_behind_after_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process here dies of SIGKILL, so the test disables the worker's kill functions."""
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        survivor = psutil.Process(int(output.readline()))
    trainer = TrainerProcess(process, TrainerDirectory.create(tmp_path / "trainer"))
    monkeypatch.setattr(launcher, "KILL_SECONDS", 0.01)
    seen: list[tuple[bool, bool]] = []

    def observe() -> None:
        seen.append((trainer.is_awaited, trainer.is_left_behind))

    with monkeypatch.context() as powerless:
        powerless.setattr(os, "killpg", lambda *_: None)
        powerless.setattr(psutil.Process, "kill", lambda _: None)
        observe()
        trainer.kill()
        observe()
    process.kill()
    process.wait()
    observe()
    monkeypatch.setattr(launcher, "UNKILLABLE_SECONDS", -1)
    observe()
    survivor.kill()
    psutil.wait_procs([survivor], timeout=30)
    observe()
    trainer.close()

    assert seen == [(True, False), (True, False), (True, False), (False, True), (False, False)]


def test_a_trainer_is_one_process_with_a_limit_of_its_workers_silence(tmp_path: Path) -> None:
    argv = trainer_argv(tmp_path, silence_seconds=60)

    assert argv == [sys.executable, "-m", "worker.children.trainer.main", str(tmp_path), f"{OPTION}60"]


@pytest.mark.parametrize(("device", "niceness"), [(devices.cpu(), NICENESS), (GPU, 0)])
def test_a_trainer_on_a_cpu_has_a_low_priority(tmp_path: Path, device: devices.Device, niceness: int) -> None:
    trainer = launch(TrainerDirectory(tmp_path), device, silence_seconds=60, bases_dir=tmp_path)

    try:
        assert psutil.Process(trainer.pid).nice() == min(19, psutil.Process().nice() + niceness)
    finally:
        trainer.close()


def hold(silence_seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"{OPTION}{silence_seconds}"], stdin=subprocess.PIPE, cwd=ROOT
    )


def test_a_trainer_exits_when_its_parents_pipe_closes() -> None:
    with hold(silence_seconds=60) as child:
        assert child.stdin is not None
        child.stdin.close()

        assert child.wait(30) == LOST_PARENT


def test_a_trainer_exits_when_its_parent_sends_no_heartbeats() -> None:
    with hold(silence_seconds=0.2) as child:
        assert child.wait(30) == LOST_PARENT


@pytest.mark.parametrize("command", [dying_with_parent, partial(confined, sandbox=Sandbox(kind="trainer"))])
def test_a_child_whose_parent_is_gone_does_not_start(command: Callable[[list[str]], list[str]]) -> None:
    argv = command([sys.executable, "-c", "print('began')"])
    argv[argv.index(str(os.getpid()))] = "1"

    ended = subprocess.run(argv, capture_output=True, cwd=ROOT, check=False)

    assert ended.returncode == LOST_PARENT
    assert ended.stdout == b""


MODPROBE = """#!/bin/sh
echo "$@" >> {calls}
touch {node}
exit {status}
"""


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("device", [GPU, devices.cpu()], ids=["GPU", "CPU"])
def test_the_worker_creates_the_uvm_node_before_the_first_gpu_trainer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: devices.Device,
    status: int,
) -> None:
    """The trainer could not create it in its sandbox: no_new_privs disables the program's setuid bit."""
    calls, uvm, program = tmp_path / "calls", tmp_path / "nvidia-uvm", tmp_path / "nvidia-modprobe"
    program.write_text(MODPROBE.format(calls=calls, node=uvm if status == 0 else "/dev/null", status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(devices, "UVM_NODE", uvm)
    devices.create_uvm_node.cache_clear()

    for name in ("first", "second"):
        directory = TrainerDirectory.create(tmp_path / name)
        launch(directory, device, silence_seconds=60, bases_dir=tmp_path).close()

    assert (calls.read_text() if calls.exists() else "") == ("-u -c 0\n" if device is GPU else "")
    assert ("could not be created" in caplog.text) == (device is GPU and status != 0)
    devices.create_uvm_node.cache_clear()
