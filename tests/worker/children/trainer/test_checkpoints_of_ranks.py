"""The leader of several ranks writes checkpoints in a thread, while all ranks train on.

The thread is for GPUs. Here it writes for a trainer on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from catalog import failpoints
from tests.worker.children.trainer.test_checkpoint_writer import EVERY, NUM_STEPS, OPENED_AFTER_SECONDS, ROOT, body
from tests.worker.pack_site import events_in
from tests.worker.trainer_settings import trainer_settings
from tests.worker_site import WAIT_SECONDS
from worker.protocol.mailbox import InboxWriter, TrainerDirectory
from worker.protocol.rendezvous import RANKS_FILE

NUM_RANKS = 2
TRAINS = """
import errno, os, sys
from lora_core.engine.checkpoint import CheckpointSnapshot
from worker.children.trainer import message_handlers
from worker.children.trainer.main import main

def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

directory, how = sys.argv[1:]
message_handlers.writes_while_training = lambda *_: how != "between ticks"
if how == "full disk":
    CheckpointSnapshot.write = no_space if os.environ["RANK"] == "0" else None  # the others write nothing
sys.exit(main([directory]))
"""


class Site:
    """A trainer of several ranks, whose messages were sent before it started."""

    def __init__(self, folder: Path, base_dir: Path) -> None:
        self.directory = TrainerDirectory.create(folder, trainer_settings(base_dir) | {"idle_seconds": 0.0})
        self.inbox = InboxWriter(self.directory)
        self.gate = folder.parent / f"{folder.name}-gate"
        self._processes: list[subprocess.Popen[bytes]] = []

    def admit(self, claim_id: str = "claim-1") -> None:
        self.inbox.send("admit", **body(self.directory, claim_id))

    @contextmanager
    def running(self, how: str, *others: str) -> Iterator[None]:
        """Run all ranks. The leader's thread completes no checkpoint before the gate is opened. others: failpoints."""
        shared = {
            **os.environ,
            "WORLD_SIZE": str(NUM_RANKS),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            RANKS_FILE: str(self.directory.path / "ranks"),
            failpoints.VARIABLE: ",".join([f"in_checkpoint:wait={self.gate}", *others]),
        }
        command = [sys.executable, "-c", TRAINS, str(self.directory.path), how]
        self._processes = [
            subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(NUM_RANKS)
        ]
        try:
            yield
        finally:
            for process in self._processes:
                process.kill()
                process.wait()

    def wait_for(self, event_type: str, step: int) -> None:
        self._wait(lambda: (event_type, step) in self.order(event_type), f"{event_type} of step {step}")

    def finish(self) -> None:
        """Wait until all ranks have exited."""
        self._wait(lambda: all(process.poll() is not None for process in self._processes), "all ranks exit")
        assert [process.returncode for process in self._processes] == [0] * NUM_RANKS

    def _wait(self, is_reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached():
            assert time.monotonic() < deadline, what
            assert not any(process.poll() for process in self._processes), "a rank has failed"
            time.sleep(0.02)

    def order(self, *wanted: str, claim_id: str | None = None) -> list[tuple[str, int]]:
        """Return type and step of the events of these types, of one job or of all."""
        found = [event for event in events_in(self.directory) if event["type"] in wanted]
        return [(event["type"], event["step"]) for event in found if claim_id in (None, event["claim_id"])]

    def files(self) -> dict[str, bytes]:
        """Return the files of all checkpoints, and the final adapter."""
        job = self.directory.job_path("claim-1")
        found = [*(job / "checkpoints").rglob("*"), *(job / "adapter").rglob("*.safetensors")]
        return {str(path.relative_to(job)): path.read_bytes() for path in found if path.is_file()}


@pytest.fixture
def make_site(tmp_path: Path, base_dir: Path) -> Callable[..., Site]:
    def make(name: str) -> Site:
        site = Site(tmp_path / name, base_dir)
        site.admit()
        return site

    return make


def test_all_ranks_train_while_the_leader_writes_the_same_bytes(make_site: Callable[..., Site]) -> None:
    itself, with_thread = make_site("itself"), make_site("thread")
    itself.gate.touch()
    with itself.running("between ticks"):
        itself.finish()

    with with_thread.running("in a thread"):
        with_thread.wait_for("stepped", EVERY + 1)
        reported = with_thread.order("checkpointed")
        with_thread.gate.touch()
        with_thread.finish()

    assert reported == [], "training continues before the checkpoint is complete"
    assert with_thread.order("checkpointed", "exported") == itself.order("checkpointed", "exported")
    assert with_thread.files() == itself.files()
    assert {f"checkpoints/step-{step}/row.safetensors" for step in (2, 4, 6)} < with_thread.files().keys()


def test_ranks_agree_that_a_step_is_saved_whose_checkpoint_only_the_leader_writes(
    make_site: Callable[..., Site],
) -> None:
    site = make_site("paused")
    site.inbox.send("admit", **body(site.directory, "claim-2"))
    begun = site.gate.with_name("begun")
    with site.running("in a thread", f"step_{EVERY}:wait={begun}"):
        site.wait_for("stepped", EVERY)
        site.inbox.send("pause", claim_id="claim-1")
        begun.touch()  # the checkpoint begins, and the next message is the pause
        threading.Timer(OPENED_AFTER_SECONDS, site.gate.touch).start()
        site.wait_for("exported", NUM_STEPS)
        site.finish()

    kinds = ("checkpointed", "paused", "exported")
    by_job = {claim_id: site.order(*kinds, claim_id=claim_id) for claim_id in ("claim-1", "claim-2")}
    assert by_job["claim-1"] == [("checkpointed", EVERY), ("paused", EVERY)]
    assert by_job["claim-2"] == [*(("checkpointed", step) for step in (2, 4, 6)), ("exported", NUM_STEPS)]


def test_full_disk_of_the_leader_costs_the_checkpoints_and_not_the_job(make_site: Callable[..., Site]) -> None:
    site = make_site("full")
    site.gate.touch()
    with site.running("full disk"):
        site.finish()

    found = site.order("checkpoint_failed", "checkpointed", "exported")
    failed = [("checkpoint_failed", step) for step in range(EVERY, NUM_STEPS, EVERY)]
    assert found == [*failed, ("exported", NUM_STEPS)]
