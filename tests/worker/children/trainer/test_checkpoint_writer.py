"""Checkpoints that a thread writes have the bytes of others, are reported in order, and never stop training for long.

The thread is for GPUs. Here it writes for a trainer on a CPU.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from catalog import failpoints
from catalog.spec.job import JobRequest, resolve
from lora_core.engine.checkpoint import CheckpointSnapshot
from lora_core.events import JobDiverged
from lora_core.peft_format.export import AdapterSnapshot
from tests.worker.pack_site import events_in
from tests.worker.trainer_settings import trainer_settings
from worker.children.tokenizer.token_file import TokenFile
from worker.children.trainer import message_handlers
from worker.children.trainer.checkpoint_writer import (
    CheckpointDraft,
    CheckpointFiles,
    CheckpointWriter,
    writes_while_training,
)
from worker.children.trainer.main import load_engine, run
from worker.children.trainer.message_handlers import MessageHandlers
from worker.protocol.mailbox import AdmitBody, EventWriter, InboxWriter, Json, TrainerDirectory, Verb

NUM_STEPS, EVERY = 7, 2
OPENED_AFTER_SECONDS = 0.3
ROOT = Path(__file__).parents[4]
RUNS_WITH_THREAD = """
import sys
from pathlib import Path
from worker.children.trainer import message_handlers
from worker.children.trainer.main import run
from worker.protocol.mailbox import TrainerDirectory

message_handlers.writes_while_training = lambda *_: True
run(TrainerDirectory(Path(sys.argv[1])))
"""


class Trainer:
    """A trainer whose jobs are admitted and ticked by the test."""

    def __init__(self, folder: Path, base_dir: Path) -> None:
        self.directory = TrainerDirectory.create(folder, trainer_settings(base_dir, dtype="bfloat16"))
        self.writer = EventWriter(self.directory)
        self.handlers = MessageHandlers(self.directory, load_engine(self.directory, self.writer), self.writer)
        self.engine = self.handlers.engine
        self._inbox = InboxWriter(self.directory)
        self._is_closed = False

    def admit(self, claim_id: str = "claim-1", *, resume: str | None = None) -> None:
        self.handlers._admit(body(self.directory, claim_id, resume=resume))

    def tick_until(self, step: int, claim_id: str = "claim-1") -> None:
        """Train until the job has completed that step. Nothing is reported except by ticks."""
        while self.engine.progress(claim_id)[0] < step:
            self.handlers.tick()

    def finish(self) -> None:
        while self.handlers._jobs:
            self.handlers.tick()
            self.handlers.report()

    def send(self, verb: Verb, claim_id: str = "claim-1") -> None:
        self._inbox.send(verb, claim_id=claim_id)
        self.handlers.read_inbox(begins_answers=True)

    def events(self, *wanted: str) -> list[Json]:
        return [event for event in events_in(self.directory) if event["type"] in wanted or not wanted]

    def order(self, *wanted: str) -> list[tuple[str, int]]:
        """Return type and step of the events of these types."""
        return [(event["type"], event.get("step", -1)) for event in self.events(*wanted)]

    def files(self, claim_id: str = "claim-1") -> dict[str, bytes]:
        """Return the files of the job's checkpoints."""
        folder = self.directory.job_path(claim_id) / "checkpoints"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def adapter(self) -> bytes:
        """Return the final weights of the job."""
        (exported,) = self.events("exported")
        return (self.directory.path / exported["folder"] / "adapter_model.safetensors").read_bytes()

    def close(self) -> None:
        """Close it, unless it was closed."""
        if not self._is_closed:
            self.handlers.close()
            self.writer.close()
        self._is_closed = True


def body(directory: TrainerDirectory, claim_id: str, *, resume: str | None = None) -> AdmitBody:
    """Return the body of an `admit` message, and write the job's tokens."""
    folder = directory.job_path(claim_id)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokens.safetensors").exists():
        with TokenFile(folder / "tokens.safetensors") as tokens:
            for row in range(6):
                tokens.add_row(np.arange(20, dtype=np.int32) + 7 * row, (np.arange(20) >= 10).astype(np.uint8))
            tokens.finish()
    tokens_name = f"jobs/{claim_id}/tokens.safetensors"
    request = {"model": "tiny", "training_file": "f", "lora": {"rank": 4, "use_dora": True}}
    spec = resolve(JobRequest.model_validate(request), num_rows=6, max_positions=256, seed=1)
    return {
        "claim_id": claim_id,
        "job_id": "ftjob-1",
        "base_name": "tiny",
        "base_revision": None,
        "spec": spec.model_dump(mode="json"),
        "num_steps": NUM_STEPS,
        "evaluate_every_steps": NUM_STEPS,
        "checkpoint_every_steps": EVERY,
        "answered_steps": [],
        "asks_as_chat": True,
        "shortages": 0,
        "train": tokens_name,
        "valid": None,
        "resume": resume,
        "parent": None,
        "trace": None,
    }


@pytest.fixture
def make_trainer(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    """Return a function that makes trainers. in_thread: a thread writes their checkpoints."""
    made: list[Trainer] = []

    def make(name: str = "trainer", *, in_thread: bool = True) -> Trainer:
        monkeypatch.setattr(message_handlers, "writes_while_training", lambda *_: in_thread)
        made.append(Trainer(tmp_path / name, base_dir))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


class Gate:
    """Keeps the writing thread from completing a checkpoint until it is opened."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        monkeypatch.setenv(failpoints.VARIABLE, f"in_checkpoint:wait={path}")

    def open(self) -> None:
        self._path.touch()

    def open_soon(self) -> None:
        """Open it while the test already waits for the thread."""
        threading.Timer(OPENED_AFTER_SECONDS, self.open).start()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate", monkeypatch)
    yield gate
    gate.open()


def test_only_a_gpu_trains_while_checkpoints_are_written() -> None:
    assert writes_while_training("cuda:0")
    assert not writes_while_training("cpu")


def test_the_thread_writes_the_bytes_of_the_trainer_itself(make_trainer: Callable[..., Trainer]) -> None:
    itself, with_thread = make_trainer("itself", in_thread=False), make_trainer("thread")
    for trainer in (itself, with_thread):
        trainer.admit()
        trainer.finish()

    assert with_thread.files() == itself.files()
    assert len(with_thread.files()) == 4 * (NUM_STEPS // EVERY), "a checkpoint and an adapter, of two files each"
    fields = [[drop_times(event) for event in trainer.events("checkpointed")] for trainer in (itself, with_thread)]
    assert fields[0] == fields[1]
    assert [span["name"] for event in with_thread.events("checkpointed") for span in event["spans"]] == [
        "checkpoint"
    ] * (NUM_STEPS // EVERY)


def drop_times(event: Json) -> Json:
    return {name: value for name, value in event.items() if name not in ("seconds", "spans")}


def test_training_continues_while_a_checkpoint_is_written(make_trainer: Callable[..., Trainer], gate: Gate) -> None:
    trainer = make_trainer()
    trainer.admit()
    trainer.tick_until(EVERY + 1)
    trainer.handlers.report()

    assert trainer.order("stepped", "checkpointed") == [("stepped", step) for step in (1, 2, 3)]

    gate.open_soon()
    while not trainer.events("checkpointed"):
        trainer.handlers.report()
    assert trainer.order("checkpointed") == [("checkpointed", 2)]


def export_during_checkpoint(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, *, complete: Callable[[], None]
) -> list[tuple[str, int]]:
    """Export one job while the checkpoint of another is written. Returns what was reported in the export.

    complete: lets the thread complete the checkpoint.
    """
    export, reported = message_handlers.exported, list[tuple[str, int]]()

    def export_while_writing(*args: Any, between: Callable[[], None], **options: Any) -> Json | None:
        (pending,) = trainer.handlers._writer._pending
        complete()
        pending.outcome.exception()
        between()
        reported.extend(trainer.order("checkpointed"))
        return export(*args, between=between, **options)

    monkeypatch.setattr(message_handlers, "exported", export_while_writing)
    trainer.admit("exports")
    trainer.handlers._jobs["exports"].checkpoint_every_steps = 2 * NUM_STEPS
    trainer.tick_until(NUM_STEPS - EVERY - 1, "exports")
    trainer.admit("trains")
    while "exports" in trainer.handlers._jobs:
        trainer.handlers.tick()
    return reported


def test_a_checkpoint_is_reported_while_another_job_is_exported(
    make_trainer: Callable[..., Trainer], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = export_during_checkpoint(make_trainer(), monkeypatch, complete=gate.open)

    assert reported == [("checkpointed", EVERY)]


def test_an_unexpected_error_of_the_thread_is_not_blamed_on_a_job_that_is_exported(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    monkeypatch.setenv(failpoints.VARIABLE, "in_checkpoint:raise")

    export_during_checkpoint(trainer, monkeypatch, complete=lambda: None)

    assert [event["claim_id"] for event in trainer.events("exported", "refused")] == ["exports"]
    with pytest.raises(failpoints.Failure):
        trainer.finish()


@pytest.mark.parametrize(
    ("num_ticks", "act"),
    [(2 * EVERY - 1, lambda trainer: trainer.tick_until(2 * EVERY)), (EVERY, lambda trainer: trainer.close())],
    ids=["before the next checkpoint", "before the exit of the trainer"],
)
def test_a_trainer_waits_for_the_last_checkpoint_of_a_job(
    make_trainer: Callable[..., Trainer], gate: Gate, num_ticks: int, act: Callable[[Trainer], None]
) -> None:
    trainer = make_trainer()
    trainer.admit()
    trainer.tick_until(num_ticks)

    gate.open_soon()
    act(trainer)

    assert trainer.order("checkpointed") == [("checkpointed", 2)]


@pytest.mark.parametrize(
    ("verb", "reported"),
    [
        ("pause", [("checkpointed", 2), ("checkpointed", 3), ("paused", 3)]),
        ("preempt", [("checkpointed", 2), ("checkpointed", 3), ("paused", 3)]),
        ("drain", [("checkpointed", 2), ("checkpointed", 3), ("paused", 3)]),
        ("cancel", [("checkpointed", 2), ("cancelled", -1)]),
    ],
)
def test_a_job_leaves_after_its_checkpoint_is_reported(
    make_trainer: Callable[..., Trainer], gate: Gate, verb: Verb, reported: list[tuple[str, int]]
) -> None:
    trainer = make_trainer()
    trainer.admit()
    trainer.tick_until(3)
    gate.open_soon()

    trainer.send(verb)

    assert trainer.order("checkpointed", "paused", "cancelled") == reported


def test_an_older_checkpoint_is_kept_if_the_last_one_of_a_leaving_job_fails(
    make_trainer: Callable[..., Trainer], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.admit("claim-1")
    trainer.tick_until(EVERY, "claim-1")  # its checkpoint keeps the thread busy
    trainer.handlers._jobs["claim-1"].checkpoint_every_steps = NUM_STEPS
    trainer.admit("claim-2")
    trainer.tick_until(EVERY + 1, "claim-2")
    monkeypatch.setattr(trainer.engine, "save_checkpoint", no_space)
    gate.open_soon()

    trainer.send("preempt", "claim-2")

    kinds = ("checkpointed", "checkpoint_failed", "paused")
    of_job = [(event["type"], event["step"]) for event in trainer.events(*kinds) if event["claim_id"] == "claim-2"]
    assert of_job == [("checkpointed", EVERY), ("checkpoint_failed", EVERY + 1), ("paused", EVERY + 1)]


def test_a_pause_at_the_step_of_an_unwritten_checkpoint_saves_no_other(
    make_trainer: Callable[..., Trainer], gate: Gate
) -> None:
    trainer = make_trainer()
    trainer.admit()
    trainer.tick_until(EVERY)
    gate.open_soon()

    trainer.send("pause")

    assert trainer.order("checkpointed", "paused", "checkpoint_failed") == [("checkpointed", 2), ("paused", 2)]


def test_the_end_of_training_is_reported_after_the_last_checkpoint(
    make_trainer: Callable[..., Trainer], gate: Gate
) -> None:
    trainer = make_trainer()
    trainer.admit()
    trainer.handlers._jobs["claim-1"].checkpoint_every_steps = NUM_STEPS - 1
    trainer.tick_until(NUM_STEPS - 1)
    gate.open_soon()

    trainer.finish()

    kinds = ("checkpointed", "finished", "exported")
    assert trainer.order(*kinds) == [("checkpointed", 6), ("finished", 7), ("exported", 7)]


def test_a_divergence_is_reported_after_the_checkpoint_of_its_good_step(
    make_trainer: Callable[..., Trainer], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.admit()
    trainer.tick_until(EVERY + 1)
    diverged = JobDiverged(job="claim-1", step=3, good_step=3, message="The update is not finite.")
    monkeypatch.setattr(trainer.engine, "tick", lambda: [diverged])
    gate.open_soon()

    trainer.handlers.tick()

    kinds = ("checkpointed", "diverged")
    assert trainer.order(*kinds) == [("checkpointed", 2), ("checkpointed", 3), ("diverged", 3)]


def test_a_trainer_that_crashes_reports_the_checkpoints_that_are_being_written(
    tmp_path: Path, base_dir: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_handlers, "writes_while_training", lambda *_: True)
    directory = TrainerDirectory.create(tmp_path / "trainer", trainer_settings(base_dir, dtype="bfloat16"))
    InboxWriter(directory).send("admit", **body(directory, "claim-1"))
    tick = MessageHandlers.tick

    def crash_after_checkpoint(handlers: MessageHandlers) -> None:
        if handlers.engine.progress("claim-1")[0] == EVERY:
            gate.open_soon()
            raise RuntimeError("an illegal memory access")
        tick(handlers)

    monkeypatch.setattr(MessageHandlers, "tick", crash_after_checkpoint)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(directory)

    steps = [(event["type"], event.get("step")) for event in events_in(directory)]
    assert steps[-2:] == [("stepped", EVERY), ("checkpointed", EVERY)]


def no_space(*_: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_checkpoint_and_not_the_job(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.admit()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSnapshot, "write", no_space)
        trainer.tick_until(EVERY)
        trainer.handlers._settle("claim-1")
    trainer.finish()

    (failed,) = trainer.events("checkpoint_failed")
    assert (failed["step"], failed["error"]["code"]) == (2, "out_of_space")
    assert trainer.order("checkpointed", "exported") == [("checkpointed", 4), ("checkpointed", 6), ("exported", 7)]


def test_an_adapter_that_does_not_fit_on_the_disk_costs_the_model_alone(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.admit()
    monkeypatch.setattr(AdapterSnapshot, "write", no_space)

    trainer.tick_until(EVERY)
    trainer.handlers._settle("claim-1")

    unexported, saved = trainer.events("checkpoint_unexported", "checkpointed", "checkpoint_failed")
    assert (unexported["type"], unexported["error"]["code"]) == ("checkpoint_unexported", "out_of_space")
    assert (saved["type"], saved["adapter"]) == ("checkpointed", None)
    assert "num_parameters" not in saved


def test_an_unexpected_error_of_the_thread_ends_the_trainer(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.admit()
    monkeypatch.setenv(failpoints.VARIABLE, "in_checkpoint:raise")

    with pytest.raises(failpoints.Failure):
        trainer.finish()

    assert trainer.events("checkpointed") == []


def test_a_job_killed_in_a_checkpoint_resumes_from_the_one_before(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    whole, first, last = make_trainer("whole"), make_trainer("first"), make_trainer("last")
    whole.admit()
    whole.finish()
    first.admit()
    first.tick_until(EVERY)
    first.send("pause")
    (saved,) = first.events("checkpointed")

    killed = TrainerDirectory.create(tmp_path / "killed", first.directory.settings() | {"idle_seconds": 0.0})
    resume = staged(killed, first.directory.path / saved["folder"])
    InboxWriter(killed).send("admit", **body(killed, "claim-1", resume=resume))
    environment = os.environ | {failpoints.VARIABLE: "in_checkpoint:kill"}
    command = [sys.executable, "-c", RUNS_WITH_THREAD, str(killed.path)]
    process = subprocess.run(command, cwd=ROOT, env=environment, check=False)

    assert process.returncode == -signal.SIGKILL
    steps = [(event["type"], event["step"]) for event in events_in(killed) if "step" in event]
    assert steps[0] == ("admitted", 2)
    assert "checkpointed" not in dict(steps)
    last.admit(resume=staged(last.directory, first.directory.path / saved["folder"]))
    last.finish()
    assert last.adapter() == whole.adapter()
    assert last.files() == {name: content for name, content in whole.files().items() if not name.startswith("step-2")}


def staged(directory: TrainerDirectory, checkpoint: Path) -> str:
    """Copy a checkpoint into a trainer's directory, and return its name there."""
    shutil.copytree(checkpoint, directory.path / "resume")
    return "resume"


def draft(folder: Path, *, write: Callable[[Path], None], claim_id: str = "claim-1") -> CheckpointDraft:
    """Return a checkpoint without an adapter, which `write` writes."""
    files = CheckpointFiles(claim_id=claim_id, step=1, folder=folder, adapter_folder=folder)
    snapshot = cast(CheckpointSnapshot, SimpleNamespace(write=write))
    return CheckpointDraft(files=files, checkpoint=snapshot, adapter=None, began_at=0.0)


# The memory of a written snapshot is free for the next one.
@pytest.mark.parametrize(("free_bytes", "num_kept"), [(0, 1), (399, 4), (400, 5)])
def test_more_than_one_snapshot_exists_only_while_memory_is_ample(
    tmp_path: Path, free_bytes: int, num_kept: int
) -> None:
    gate, num_begun = threading.Event(), 0

    def free_host_bytes() -> int:
        if num_begun == 5:  # now, and not before, make_room may wait for the thread
            gate.set()
        return free_bytes

    writer = CheckpointWriter(free_host_bytes=free_host_bytes)
    assert list(writer.make_room(100)) == [], "the first one needs no further memory"
    for _ in range(5):
        writer.begin(draft(tmp_path, write=lambda _: cast(None, gate.wait())), num_bytes=100)
    num_begun = 5

    num_written = len(list(writer.make_room(100)))

    assert 5 - num_written == num_kept
    assert len(list(writer.close())) == num_kept


def test_discarded_checkpoints_are_not_written(tmp_path: Path) -> None:
    gate, wrote = threading.Event(), list[str]()
    writer = CheckpointWriter(free_host_bytes=lambda: 0)
    writer.begin(draft(tmp_path, write=lambda _: cast(None, gate.wait()), claim_id="begun"), num_bytes=100)
    for claim_id in ("leaves", "stays"):
        writer.begin(draft(tmp_path, write=lambda _, name=claim_id: wrote.append(name), claim_id=claim_id), num_bytes=1)

    writer.discard("leaves")
    assert list(writer.settle("leaves")) == []
    gate.set()

    assert [outcome.files.claim_id for outcome in writer.close()] == ["begun", "stays"]
    assert wrote == ["stays"]


def test_a_job_waits_only_for_its_own_checkpoint_and_those_before_it(tmp_path: Path) -> None:
    gate = threading.Event()
    writer = CheckpointWriter(free_host_bytes=lambda: 0)
    writer.begin(draft(tmp_path, write=lambda _: None, claim_id="first"), num_bytes=100)
    writer.begin(draft(tmp_path, write=lambda _: cast(None, gate.wait()), claim_id="blocked"), num_bytes=100)

    settled = [outcome.files.claim_id for outcome in (*writer.settle("none"), *writer.settle("first"))]

    assert settled == ["first"]
    gate.set()
    assert [outcome.files.claim_id for outcome in writer.close()] == ["blocked"]


class HostCache:
    """torch's cache of pinned memory. `free_bytes` is the machine's free memory, which grows by the release."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free_bytes: int, cached_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.cached_bytes = cached_bytes
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", self.release, raising=False)

    def release(self) -> None:
        self.free_bytes += self.cached_bytes
        self.cached_bytes = 0


def test_pinned_memory_is_released_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = HostCache(monkeypatch, free_bytes=400, cached_bytes=300)
    writer = CheckpointWriter(free_host_bytes=lambda: cache.free_bytes)

    list(writer.make_room(100))
    assert cache.cached_bytes == 300
    list(writer.make_room(101))

    assert cache.cached_bytes == 0


def test_released_memory_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a snapshot would be taken for which there is no memory."""
    cache = HostCache(monkeypatch, free_bytes=0, cached_bytes=399)
    writer, gate = CheckpointWriter(free_host_bytes=lambda: cache.free_bytes), threading.Event()
    writer.begin(draft(tmp_path, write=lambda _: None), num_bytes=399)
    list(writer.settle("claim-1"))
    writer.begin(draft(tmp_path, write=lambda _: cast(None, gate.wait())), num_bytes=1)
    threading.Timer(OPENED_AFTER_SECONDS, gate.set).start()

    assert len(list(writer.make_room(100))) > 0
    list(writer.close())


def test_an_idle_trainer_releases_pinned_memory(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HostCache(monkeypatch, free_bytes=2**40, cached_bytes=300)
    settings = trainer_settings(base_dir, dtype="bfloat16", idle_seconds=0.0)
    directory = TrainerDirectory.create(tmp_path / "trainer", settings)

    run(directory)

    assert cache.cached_bytes == 0
