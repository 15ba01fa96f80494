"""A trainer of two processes, launched as a worker does: its events and files equal those of one process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from catalog.spec.job import JobRequest, resolve
from catalog.states import EndReason
from tests import tiny_base
from tests.worker.trainer_settings import trainer_settings
from tests.worker_site import WAIT_SECONDS
from worker.children.tokenizer.token_file import TokenFile
from worker.node import devices
from worker.process.exit_status import classify_exit
from worker.process.launcher import TrainerProcess, launch
from worker.protocol.mailbox import EventReader, InboxWriter, Json, TrainerDirectory

TIMED = ("seconds", "pid")
GONE_SECONDS = 120.0
LISTENS = psutil.CONN_LISTEN


class Launched:
    """A trainer of several processes, and both ends of its directory."""

    def __init__(
        self,
        folder: Path,
        base_dir: Path,
        *,
        num_processes: int,
        strategy: str = "replicated",
        meeting: Json | None = None,
    ) -> None:
        """meeting: the address at which it meets processes of other machines."""
        settings = trainer_settings(base_dir, strategy=strategy, meeting=meeting)
        self.directory = TrainerDirectory.create(folder, settings)
        self.inbox, self.reader = InboxWriter(self.directory), EventReader(self.directory)
        self.events: list[Json] = []
        self.process: TrainerProcess = launch(
            self.directory,
            devices.cpu(),
            silence_seconds=WAIT_SECONDS,
            bases_dir=base_dir,
            num_processes=num_processes,
            in_gang=meeting is not None,
        )

    def admit(self, job: str, *, resume: Path | None = None, **fields: Any) -> None:
        """resume: a checkpoint in the trainer's directory."""
        folder = self.directory.job_path(job) / "train"
        folder.mkdir(parents=True)
        write_tokens(folder / "tokens.safetensors")
        request = JobRequest.model_validate({"model": "tiny", "training_file": "file-1", **fields})
        spec = resolve(request, num_rows=24, max_positions=tiny_base.MAX_POSITIONS, seed=1)
        self.inbox.send(
            "admit",
            claim_id=job,
            job_id=f"ftjob-{job}",
            base_name="tiny",
            base_revision=None,
            spec=spec.model_dump(mode="json"),
            answered_steps=[],
            asks_as_chat=False,
            shortages=0,
            num_steps=spec.max_steps,
            evaluate_every_steps=spec.max_steps,
            checkpoint_every_steps=3,
            train=self.directory.named(folder / "tokens.safetensors"),
            valid=None,
            resume=None if resume is None else self.directory.named(resume),
            parent=None,
            trace=None,
        )

    def wait_for(self, wanted: str, job: str | None = None) -> Json:
        """Wait for the first event of that type, and return it."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            self.process.send_heartbeat()
            self.events += self.reader.read()
            for event in self.events:
                if event["type"] == wanted and event.get("claim_id") == job:
                    return event
            assert self.process.returncode is None, self.directory.log_tail()
            time.sleep(0.02)
        raise AssertionError(f"{wanted}: {self.directory.log_tail()}")

    def listeners(self) -> list[tuple[int, str]]:
        """Return process and address of each listening socket of the launcher and of all ranks."""
        found = [(pid, psutil.Process(pid).net_connections("inet")) for pid in self.process.pids()]
        return [(pid, one.laddr.ip) for pid, open_ones in found for one in open_ones if one.status == LISTENS]

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@contextmanager
def launched(folder: Path, base_dir: Path, **options: Any) -> Iterator[Launched]:
    trainer = Launched(folder, base_dir, **options)
    try:
        yield trainer
    finally:
        trainer.process.close()


def write_tokens(path: Path) -> None:
    numbers = np.random.default_rng(0)
    with TokenFile(path) as file:
        for _ in range(24):
            ids = numbers.integers(0, tiny_base.VOCABULARY, numbers.integers(40, 120), dtype=np.int32)
            file.add_row(ids, (np.arange(len(ids)) > 3).astype(np.uint8))
        file.finish()


def trained(folder: Path, base_dir: Path, **options: Any) -> tuple[list[Json], str, str]:
    """Train one job to its end while another one is paused. Return the steps of the first, and the digests of its
    adapter and of the checkpoint of the other."""
    with launched(folder, base_dir, **options) as trainer:
        trainer.wait_for("ready")
        trainer.admit("ends", max_steps=6, hyperparameters={"batch_size": 16})
        trainer.admit("pauses", max_steps=100_000, lora={"rank": 4, "dropout": 0.1}, hyperparameters={"batch_size": 4})
        exported = trainer.wait_for("exported", "ends")
        trainer.inbox.send("pause", claim_id="pauses")
        step = trainer.wait_for("paused", "pauses")["step"]
        trainer.inbox.send("unload")
        trainer.wait_for("unloaded")
        assert trainer.process.wait(WAIT_SECONDS)
        assert trainer.process.returncode == 0, trainer.directory.log_tail()
        adapter = trainer.directory.path / exported["folder"] / "adapter_model.safetensors"
        checkpoint = trainer.directory.checkpoint_path("pauses", 3) / "row.safetensors"
        assert (trainer.directory.checkpoint_path("pauses", step) / "row.safetensors").exists()
        assert exported["report"]["passed"]
    steps = [event for event in trainer.events if event.get("claim_id") == "ends" and event["type"] == "stepped"]
    steps = [{name: value for name, value in event.items() if name not in TIMED} for event in steps]
    return steps, digest(adapter), digest(checkpoint)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_processes_have_the_events_and_bytes_of_one(tmp_path: Path, base_dir: Path) -> None:
    alone = trained(tmp_path / "one", base_dir, num_processes=1)
    together = trained(tmp_path / "two", base_dir, num_processes=2)

    assert len(alone[0]) == 6
    assert together == alone


def test_only_the_ranks_listen_and_only_on_the_loopback(tmp_path: Path, base_dir: Path) -> None:
    with launched(tmp_path / "two", base_dir, num_processes=2) as trainer:
        trainer.wait_for("ready")
        ranks = {process.pid for process in trainer.ranks()}

        listeners = trainer.listeners()

        assert len(ranks) == 2
        assert {pid for pid, _ in listeners} == ranks, "a launcher that listens may receive pickles"
        assert {address for _, address in listeners} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_base_sharded_by_fsdp2_trains_and_is_verified_by_peft(tmp_path: Path, base_dir: Path) -> None:
    (losses, _, _) = trained(tmp_path / "one", base_dir, num_processes=1)
    (sharded, _, _) = trained(tmp_path / "two", base_dir, num_processes=2, strategy="fsdp2")

    assert [step["loss"] for step in sharded] == pytest.approx([step["loss"] for step in losses], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_trainer_exits_with_all_processes_when_one_is_killed(tmp_path: Path, base_dir: Path, rank: int) -> None:
    with launched(tmp_path / "two", base_dir, num_processes=2) as trainer:
        trainer.wait_for("ready")
        trainer.admit("job", max_steps=5000, hyperparameters={"batch_size": 8})
        trainer.wait_for("stepped", "job")
        ranks = trainer.ranks()
        assert len(ranks) == 2

        ranks[rank].kill()

        assert trainer.process.wait(GONE_SECONDS), "it keeps running without one of its processes"
        log_tail = trainer.directory.log_tail(max_bytes=16_000)
        why = classify_exit(trainer.process.returncode or 0, log_tail, num_oom_kills=0, device_kind="cpu")
        assert why == (EndReason.TRAINER_CRASHED, "The trainer was killed (signal 9)."), log_tail
        by_kernel = classify_exit(trainer.process.returncode or 0, log_tail, num_oom_kills=1, device_kind="cpu")
        assert by_kernel[0] == EndReason.HOST_OOM
        assert psutil.wait_procs(ranks, timeout=GONE_SECONDS)[1] == []


@pytest.mark.slow
def test_two_trainers_of_one_machine_are_separate_and_exit_with_their_worker(tmp_path: Path, base_dir: Path) -> None:
    with (
        launched(tmp_path / "one", base_dir, num_processes=2) as one,
        launched(tmp_path / "other", base_dir, num_processes=2) as other,
    ):
        for trainer in (one, other):
            assert trainer.wait_for("ready")["num_processes"] == 2
        ranks = [*one.ranks(), *other.ranks()]
        assert len(ranks) == 4

        for trainer in (one, other):
            pipe = trainer.process._process.stdin  # pyright: ignore[reportPrivateUsage]
            assert pipe is not None
            pipe.close()

        assert psutil.wait_procs(ranks, timeout=GONE_SECONDS)[1] == []


def test_all_processes_exit_with_their_launcher(tmp_path: Path, base_dir: Path) -> None:
    with launched(tmp_path / "two", base_dir, num_processes=2) as trainer:
        trainer.wait_for("ready")
        ranks = trainer.ranks()

        psutil.Process(trainer.process.pid).kill()

        assert psutil.wait_procs(ranks, timeout=GONE_SECONDS)[1] == []
