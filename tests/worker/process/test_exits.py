"""Classification of trainer exits."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from catalog.states import EndReason
from tests.worker.test_several_processes import launched
from worker.process.exit_status import DISK_FULL, classify_exit
from worker.process.sandbox import REFUSED

LAUNCHER = "subprocess.CalledProcessError: Command '[…]' {}"


@pytest.mark.parametrize(
    ("returncode", "log_tail", "num_oom_kills", "expected"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 0, EndReason.CUDA_OOM),
        (1, "torch.AcceleratorError: CUDA error: out of memory", 0, EndReason.CUDA_OOM),
        (1, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling […]", 0, EndReason.CUDA_OOM),
        (1, "torch.AcceleratorError: CUDA error: an illegal memory access […]", 0, EndReason.TRAINER_CRASHED),
        (1, "RuntimeError: […] DefaultCPUAllocator: can't allocate memory: […] bytes.", 0, EndReason.HOST_OOM),
        (1, "MemoryError: Unable to allocate 64.0 GiB", 0, EndReason.HOST_OOM),
        (-9, "", 1, EndReason.HOST_OOM),
        (1, LAUNCHER.format("died with <Signals.SIGKILL: 9>."), 1, EndReason.HOST_OOM),
        (1, LAUNCHER.format("died with <Signals.SIGKILL: 9>."), 0, EndReason.TRAINER_CRASHED),
        (1, LAUNCHER.format("died with <Signals.SIGSEGV: 11>."), 0, EndReason.TRAINER_CRASHED),
        (1, LAUNCHER.format("returned non-zero exit status 113."), 0, EndReason.INFRA_LOST),
        (0, "", 0, EndReason.TRAINER_CRASHED),
    ],
)
def test_an_exit_is_classified_by_status_log_and_oom_kills(
    returncode: int, log_tail: str, num_oom_kills: int, expected: EndReason
) -> None:
    reason, detail = classify_exit(returncode, log_tail, num_oom_kills=num_oom_kills, device_kind="cuda")

    assert reason is expected
    assert detail


def test_a_sandbox_failure_is_not_classified_as_a_full_disk() -> None:
    log_tail = "The sandbox of this process could not be applied: [Errno 7] Too many rules\n"

    ended = classify_exit(REFUSED, log_tail, num_oom_kills=0, device_kind="cpu")

    assert ended == (
        EndReason.NODE_FAILED,
        "The sandbox of the trainer could not be applied: [Errno 7] Too many rules",
    )
    assert REFUSED != DISK_FULL


def test_a_crash_names_the_error_of_the_trainer_and_not_of_the_launcher() -> None:
    log_tail = "ValueError: the number 7 is wrong\n" + LAUNCHER.format("returned non-zero exit status 1.")

    _, detail = classify_exit(1, log_tail, num_oom_kills=0, device_kind="cuda")

    assert "ValueError: the number 7 is wrong" in detail
    assert "CalledProcessError" not in detail


NUMPY = "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 64.0 GiB for an array"
TORCH = "torch.OutOfMemoryError: Unable to allocate 64.0 GiB for an array"


@pytest.mark.parametrize("log_tail", [NUMPY, TORCH, f"{NUMPY}\n\nThe above exception […]:\n\n{TORCH}"])
def test_out_of_memory_on_a_cpu_is_host_oom_with_any_message(log_tail: str) -> None:
    ended = classify_exit(1, log_tail, num_oom_kills=0, device_kind="cpu")

    assert ended == (EndReason.HOST_OOM, "The machine ran out of memory.")


def test_out_of_memory_of_numpy_is_host_oom_with_a_gpu_too() -> None:
    assert classify_exit(1, NUMPY, num_oom_kills=0, device_kind="cuda")[0] is EndReason.HOST_OOM
    assert classify_exit(1, TORCH, num_oom_kills=0, device_kind="cuda")[0] is EndReason.CUDA_OOM


def test_the_kernel_is_named_only_if_it_counted_an_oom_kill() -> None:
    """The worker may also kill a trainer that is out of memory."""
    log_tail = f"{NUMPY}\n" + LAUNCHER.format("died with <Signals.SIGKILL: 9>.")

    ends = [classify_exit(1, log_tail, num_oom_kills=kills, device_kind="cpu") for kills in (0, 1)]

    assert ends == [
        (EndReason.HOST_OOM, "The machine ran out of memory."),
        (EndReason.HOST_OOM, "The kernel killed the trainer because the machine ran out of memory."),
    ]


BROKEN = "lora_core.errors.BrokenPass: Memory ran out during a pass through a sharded base model, […]"


@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "log_tail",
    [
        f"{TORCH}\n\nThe above exception was the direct cause of […]:\n\n{BROKEN}",
        f"lora_core.distributed.failure_broadcast.FellowFailure: Rank 1 failed: {BROKEN}",
        f"[rank1]: {BROKEN}\n" + LAUNCHER.format("returned non-zero exit status 1."),
    ],
)
def test_out_of_memory_in_a_pass_through_a_sharded_base_is_sharded_oom(log_tail: str, device_kind: str) -> None:
    detail = "The trainer exited: memory ran out during a pass through the sharded base model."

    assert classify_exit(1, log_tail, num_oom_kills=0, device_kind=device_kind) == (EndReason.SHARDED_OOM, detail)
    assert classify_exit(-9, log_tail, num_oom_kills=1, device_kind=device_kind)[0] is EndReason.HOST_OOM


FULL = "OSError: [Errno 28] No space left on device"
OF_TORCHRUN = "  exitcode  : 114 (pid: 71)"


@pytest.mark.parametrize(
    ("returncode", "log_tail", "is_disk_full"),
    [
        (114, "", False),
        (1, f"[rank0]: {FULL}", False),
        (1, f"lora_core.distributed.failure_broadcast.FellowFailure: Rank 0 failed: {FULL}", False),
        (1, OF_TORCHRUN, False),
        (1, "", True),
    ],
)
def test_a_full_disk_is_the_nodes_fault(returncode: int, log_tail: str, is_disk_full: bool) -> None:
    ended = classify_exit(returncode, log_tail, num_oom_kills=0, device_kind="cpu", is_disk_full=is_disk_full)

    assert ended == (EndReason.NODE_FAILED, "The trainer exited because the worker's disk was full.")


def test_a_killed_trainer_is_not_attributed_to_a_full_disk() -> None:
    ended = classify_exit(-9, "", num_oom_kills=0, device_kind="cpu", is_disk_full=True)

    assert ended[0] is EndReason.TRAINER_CRASHED


def test_ranks_with_different_weights_are_the_nodes_fault() -> None:
    log_tail = "[rank1]: lora_core.errors.RanksDiffer: The weights differ.\n" + LAUNCHER.format("status 1.")

    reason, detail = classify_exit(1, log_tail, num_oom_kills=0, device_kind="cpu")

    assert (reason, detail) == (EndReason.NODE_FAILED, "The weights differ.")


SOON_SECONDS = 120.0
"""Limit for the processes to exit on a busy machine. A process that waits for the failed one waits for an hour."""


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["step_2@1:raise", "in_checkpoint@0:raise"])
def test_a_failed_process_stops_all_and_its_error_is_the_trainers(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    monkeypatch.setenv("FAILPOINT", failpoint)
    with launched(tmp_path / "two", base_dir, num_processes=2) as trainer:
        trainer.wait_for("ready")
        ranks = trainer.ranks()
        trainer.admit("job", max_steps=5000, hyperparameters={"batch_size": 8})

        assert trainer.process.wait(SOON_SECONDS), "it waits for the failed process"

        assert psutil.wait_procs(ranks, timeout=SOON_SECONDS)[1] == []
        log_tail = trainer.directory.log_tail(max_bytes=16_000)
        reason, detail = classify_exit(
            trainer.process.returncode or 0, log_tail, num_oom_kills=0, device_kind="cpu", is_disk_full=False
        )
    assert reason is EndReason.TRAINER_CRASHED
    assert f"failpoint {failpoint.partition('@')[0]}" in detail, log_tail
