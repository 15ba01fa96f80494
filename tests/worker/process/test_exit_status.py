"""Separation of root-cause and cascading failures of a node's processes, by their logs."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO

import pytest

from catalog.states import EndReason
from tests.worker.pack_site import PackSite
from tests.worker.scripted_trainer import FakeTrainer, load_forever
from worker.process.exit_status import peer_failure
from worker.protocol.errors import print_handled, rank_log
from worker.protocol.mailbox import TrainerDirectory
from worker.session.failures import LocalExit, local_exit

GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]:4711"
NCCL = (
    "[rank1]: torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:3699, remote process exited\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
)
SICK_NCCL = (
    "torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:3699, unhandled cuda error\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\n"
)
WATCHDOG = (
    "terminate called after throwing an instance of 'c10::DistBackendError'\n"
    "  what():  [PG ID 0 Rank 1] Process group watchdog thread terminated with exception: CUDA error: an illegal "
    "memory access was encountered\nFatal Python error: Aborted\n"
)
WARNING = "[rank0]:[W1126 10:00:00 ProcessGroupNCCL.cpp:1538] Warning: destroy_process_group() was not called\n"
REFUSED = "torch.distributed.DistNetworkError: The client socket has failed to connect to 10.0.0.2:4711"
KEY = "Traceback (most recent call last):\nKeyError: 'step'\n"
LAUNCHER = (
    "Traceback (most recent call last):\n"
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    "  exitcode  : {} (pid: 71)\n"
)
SEGFAULT = LAUNCHER.format(-11) + "  traceback : Signal 11 (SIGSEGV) received by PID 71\n"
TERMINATED = LAUNCHER.format(-15) + "  traceback : Signal 15 (SIGTERM) received by PID 72\n"


def fellow(rank: int, error: str) -> str:
    return f"{GLOO}\n\nThe above exception […]:\n\nlora_core.first_failure.FellowFailure: Rank {rank} failed: {error}\n"


@pytest.mark.parametrize(
    ("logs", "is_echo"),
    [
        ([GLOO], True),
        ([NCCL], True),
        ([REFUSED], True),
        ([KEY], False),
        ([WARNING + KEY], False),
        ([SICK_NCCL], False),
        ([WATCHDOG], False),
        # The processes of this node have the ranks 2 and 3.
        ([LAUNCHER.format(1) + GLOO, KEY], False),
        ([LAUNCHER.format(1) + GLOO, GLOO], True),
        ([f"{GLOO}\n{TERMINATED}", ""], True),
        ([GLOO + "\n" + SEGFAULT, ""], False),
        ([GLOO + "\n" + LAUNCHER.format(7), ""], False),
        ([GLOO, f"{GLOO}\nFatal Python error: Segmentation fault\n"], False),
        ([fellow(3, "KeyError: 'step'"), KEY], False),
        ([fellow(0, "KeyError: 'step'"), GLOO], True),
        ([fellow(0, "OSError: [Errno 28] No space left on device"), ""], True),
        ([fellow(0, "torch.OutOfMemoryError: CUDA out of memory."), KEY], True),
        ([fellow(3, GLOO), GLOO], True),
        ([fellow(0, GLOO) + SEGFAULT, ""], False),
    ],
)
def test_a_node_whose_processes_only_followed_a_peer_is_not_the_cause(logs: list[str], is_echo: bool) -> None:
    failure = peer_failure(logs, ranks=range(2, 4), returncode=1)

    assert (failure.is_echo, failure.is_own) == (is_echo, not is_echo)


@pytest.mark.parametrize(("returncode", "is_own"), [(-9, True), (-11, True), (114, True), (1, False), (-6, False)])
def test_a_node_whose_trainer_was_killed_is_the_cause(returncode: int, is_own: bool) -> None:
    assert peer_failure([GLOO], ranks=range(1), returncode=returncode).is_own == is_own


def test_a_trainer_that_its_worker_killed_is_judged_by_its_log_alone() -> None:
    failures = [peer_failure([log], ranks=range(1), returncode=None) for log in ("", GLOO, KEY)]

    assert [one.is_own for one in failures] == [False, False, True]


def ended(site: PackSite, *logs: str, is_alone: bool = False) -> LocalExit:
    directory = TrainerDirectory.create(site.context.trainers_dir() / "trainer-1", {})
    for rank, log in enumerate(logs):
        rank_log(directory.path, rank).write_text(log)
    trainer = FakeTrainer(directory, load_forever)
    trainer.returncode = 1
    context = replace(site.context, device=replace(site.context.device, kind="cuda"))
    try:
        return local_exit(context, trainer, ranks=None if is_alone else range(2))  # pyright: ignore[reportArgumentType]
    finally:
        trainer.close()


MEMORY = "torch.OutOfMemoryError: CUDA"
DISK_FULL = "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("logs", "is_echo", "reason", "named"),
    [
        ((fellow(2, DISK_FULL), GLOO), True, EndReason.INFRA_LOST, DISK_FULL),
        ((fellow(2, f"{MEMORY} […]"), GLOO), True, EndReason.INFRA_LOST, f"{MEMORY} […]"),
        ((fellow(1, f"{MEMORY} out of memory."), f"{MEMORY} […]"), False, EndReason.CUDA_OOM, ""),
        ((fellow(2, DISK_FULL) + SEGFAULT, GLOO), False, EndReason.TRAINER_CRASHED, ""),
    ],
    ids=["full disk of a peer", "memory of a peer", "own memory", "own crash after an error of a peer"],
)
def test_a_shortage_is_a_failure_of_its_own_node_and_cascades_to_others(
    site: PackSite, logs: tuple[str, ...], is_echo: bool, reason: EndReason, named: str
) -> None:
    end = ended(site, *logs)

    assert (end.is_echo, end.reason) == (is_echo, reason)
    assert named in end.detail


def handled(error: Exception) -> str:
    """Return what a trainer prints about an error that it handles."""
    with redirect_stderr(StringIO()) as printed:
        print_handled(error)
    return printed.getvalue()


def test_a_handled_error_is_not_the_cause_of_a_later_exit(site: PackSite) -> None:
    of_one_adapter = handled(ValueError("This adapter can't be verified.\nKeyError: 'rank'"))

    of_gang = ended(site, of_one_adapter + GLOO, of_one_adapter + GLOO)

    assert (of_gang.is_echo, of_gang.reason) == (True, EndReason.INFRA_LOST)
    assert "adapter" not in of_gang.detail


def test_handled_out_of_memory_is_not_the_cause_of_a_later_exit(site: PackSite) -> None:
    short = handled(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."))

    alone = ended(site, short + "KeyError: 'step'\n", is_alone=True)

    assert (alone.reason, alone.detail.endswith("KeyError: 'step'")) == (EndReason.TRAINER_CRASHED, True)


@pytest.mark.parametrize("is_alone", [True, False])
def test_the_reported_error_is_that_of_the_failed_process(site: PackSite, is_alone: bool) -> None:
    end = ended(site, GLOO + "\n" + LAUNCHER.format(1), KEY, is_alone=is_alone)

    assert end.detail == "The trainer exited with status 1. KeyError: 'step'"
