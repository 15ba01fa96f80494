"""Events that a trainer writes when its base model, its files or its memory fail."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from catalog.datasets.chat_templates import TEMPLATES
from catalog.spec.job import JobRequest, resolve
from lora_core.data.token_dataset import TokenDataset
from lora_core.distributed.ranks import ALONE
from lora_core.engine.engine import Engine
from lora_core.errors import BadAdapter, OutOfMemory
from lora_core.events import JobDiverged, JobFinished
from lora_core.model_files.import_base import Imported
from tests import tiny_base
from tests.worker.pack_site import events_in
from tests.worker.trainer_settings import trainer_settings
from worker.children import base_importer
from worker.children.trainer import main, message_handlers, outputs
from worker.children.trainer.message_handlers import MessageHandlers
from worker.children.trainer.outputs import AdmittedJob, BaseReference
from worker.protocol.errors import without_handled
from worker.protocol.mailbox import AdmitBody, EventWriter, InboxWriter, TrainerDirectory, Verb, read_json, write_json


class FullEngine:
    """An engine without torch, in which nothing fits."""

    idle = False
    ranks = ALONE
    base = SimpleNamespace(is_sharded=False)
    activations = SimpleNamespace(cached_bytes=lambda: 0)
    throughput = SimpleNamespace(tokens_per_second=0.0, table=dict)

    def __init__(self) -> None:
        self._compared: set[str] = set()

    def compare_ranks(self, job: str) -> None:
        self._compared.add(job)

    def memory(self) -> dict[str, int]:
        return {"base_bytes": 0, "adapter_bytes": 0, "peak_bytes": 0}

    def admit(self, job: str, *_: object, **__: object) -> None:
        raise OutOfMemory(job, num_tokens=0)

    def tick(self) -> list[Any]:
        raise OutOfMemory("claim-1", num_tokens=1024)

    def export(self, job: str, *_: object, **__: object) -> None:
        assert job in self._compared, "the weights of the ranks were not compared"
        raise OutOfMemory(job, num_tokens=0)

    def evict(self, job: str) -> None:
        """Frees memory in the real engine."""


def body(claim_id: str = "claim-1") -> AdmitBody:
    """Return the body of an `admit` message whose files don't exist."""
    request = JobRequest(model="tiny", training_file="file-1")
    spec = resolve(request, num_rows=10, max_positions=256, seed=1).model_dump(mode="json")
    return {
        "claim_id": claim_id,
        "job_id": "ftjob-1",
        "base_name": "tiny",
        "base_revision": None,
        "spec": spec,
        "num_steps": 1,
        "evaluate_every_steps": 1,
        "checkpoint_every_steps": 1,
        "answered_steps": [],
        "asks_as_chat": True,
        "shortages": 0,
        "train": "jobs/claim-1/train/tokens.safetensors",
        "valid": None,
        "resume": None,
        "parent": None,
        "trace": None,
    }


@pytest.fixture
def directory(tmp_path: Path) -> TrainerDirectory:
    return TrainerDirectory.create(tmp_path / "trainer", trainer_settings(tmp_path / "base"))


@pytest.fixture
def trainer(directory: TrainerDirectory) -> Iterator[MessageHandlers]:
    """Yield message handlers with a full engine and two jobs in it."""
    trainer = MessageHandlers(directory, cast(Engine, FullEngine()), EventWriter(directory))
    trainer._jobs = {
        name: AdmittedJob(
            checkpoint_every_steps=1, base=BaseReference(name="tiny", revision=None), num_steps=1, saved_step=0
        )
        for name in ("claim-0", "claim-1")
    }
    yield trainer
    trainer.events.close()


def test_an_unloadable_base_is_rejected_with_code_and_remedy(directory: TrainerDirectory, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')

    main.run(directory)

    (refused,) = events_in(directory)
    assert refused["type"] == "load_refused"
    assert refused["error"]["code"]
    assert refused["error"]["remedy"]


def import_arguments(folder: Path, source: str, kind: str) -> dict[str, Any]:
    files = {"target_dir": str(folder / "base"), "result": str(folder / "result.json")}
    return {"source": source, "kind": kind, "revision": None, "chat_template": None, **files}


def test_an_import_reports_the_commit_and_license_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_importer, "import_base", lambda **_: Imported(commit="c0ffee", license="apache-2.0"))
    monkeypatch.setattr(base_importer, "describe_base", lambda _: {"dtype": "float32"})
    given = {
        "source": "org/model",
        "kind": "hub",
        "revision": None,
        "chat_template": None,
        "target_dir": str(tmp_path / "base"),
    }
    write_json(tmp_path / "arguments.json", {**given, "result": str(tmp_path / "result.json")})

    base_importer.import_base_model(tmp_path / "arguments.json")

    description = {"dtype": "float32", "license": "apache-2.0", "has_chat_template": False, "renders_tools": False}
    assert read_json(tmp_path / "result.json") == {"description": description, "commit": "c0ffee"}


@pytest.mark.parametrize("template", ["zephyr", "llama3", "gemma"])
def test_an_import_rejects_a_template_whose_end_of_turn_is_no_token(tmp_path: Path, template: str) -> None:
    base = tiny_base.make(tmp_path / "tiny")
    given: dict[str, Any] = {
        "source": str(base),
        "kind": "folder",
        "revision": None,
        "target_dir": str(tmp_path / "base"),
    }
    given |= {"chat_template": TEMPLATES[template], "result": str(tmp_path / "result.json")}
    write_json(tmp_path / "arguments.json", given)

    base_importer.import_base_model(tmp_path / "arguments.json")

    result = read_json(tmp_path / "result.json")
    if template == "zephyr":  # it needs only the token that ends a text
        assert result["description"]["has_chat_template"]
        assert (tmp_path / "base" / "chat_template.jinja").read_text() == TEMPLATES["zephyr"]
    else:
        assert result["error"]["code"] == "unusable_chat_template"
        assert "zephyr" in result["error"]["remedy"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EFBIG, "import_failed"), (errno.ENOSPC, "out_of_space"), (errno.EIO, "disk_error")],
)
def test_a_failed_import_write_is_classified_by_its_error_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def fail(**_: object) -> Imported:
        raise OSError(number, "It failed")

    monkeypatch.setattr(base_importer, "import_base", fail)
    given = {
        "source": "org/model",
        "kind": "hub",
        "revision": None,
        "chat_template": None,
        "target_dir": str(tmp_path / "base"),
    }
    write_json(tmp_path / "arguments.json", {**given, "result": str(tmp_path / "result.json")})

    base_importer.import_base_model(tmp_path / "arguments.json")

    assert read_json(tmp_path / "result.json")["error"]["code"] == code


def test_a_disk_error_in_a_jobs_files_rejects_only_that_job(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> TokenDataset:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(TokenDataset, "load", fail)

    trainer._admit(body())

    (refused,) = events_in(directory)
    assert (refused["type"], refused["claim_id"]) == ("refused", "claim-1")
    assert refused["error"]["code"] == "disk_error"


def test_a_job_that_does_not_fit_is_rejected_on_admission(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenDataset, "load", lambda _: None)

    trainer._admit(body("claim-2"))

    (refused,) = events_in(directory)
    assert (refused["claim_id"], refused["error"]["code"]) == ("claim-2", "out_of_memory")
    assert set(trainer._jobs) == {"claim-0", "claim-1"}


def test_export_and_verification_send_events_before_they_finish(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def succeed(*_: object, between: Callable[[], None], **__: object) -> None:
        between()

    def fail(*_: object, between: Callable[[], None], **__: object) -> None:
        between()
        raise OutOfMemory("claim-1", num_tokens=0)

    monkeypatch.setattr(message_handlers, "REPORT_SECONDS", 0)
    monkeypatch.setattr("lora_core.peft_format.verify.verify_export", fail)
    monkeypatch.setattr(trainer.engine, "export", succeed)

    trainer._export(JobFinished(job="claim-1", step=1, kept_step=1))

    assert [event["type"] for event in events_in(directory)] == ["memory", "memory", "refused"]


def test_prompts_are_checked_when_they_are_prepared(trainer: MessageHandlers, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    monkeypatch.setattr(message_handlers, "BaseText", lambda _: None)
    monkeypatch.setattr(message_handlers, "sample_request", lambda *_, **__: "sampling")
    monkeypatch.setattr(message_handlers, "prompts_of", lambda sampling: sampling)
    monkeypatch.setattr(message_handlers, "check_prompts", lambda prompts, base: checked.append((prompts, base)))
    trainer.engine = SimpleNamespace(base="base")  # pyright: ignore[reportAttributeAccessIssue]
    evaluation = {"samples": {"prompts": ["What?"]}}
    request = JobRequest.model_validate(
        {"model": "tiny", "training_file": "file-1", "validation_file": "file-2", "evaluation": evaluation}
    )
    spec = resolve(request, num_rows=10, max_positions=256, seed=1)

    trainer._prepare_prompts("claim-1", spec, body())

    assert checked == [("sampling", "base")]
    assert trainer._jobs["claim-1"].sample_request == "sampling"


def test_a_dataset_that_does_not_fit_is_reported_as_out_of_memory(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> TokenDataset:
        raise MemoryError

    monkeypatch.setattr(TokenDataset, "load", fail)

    trainer._admit(body())

    (refused,) = events_in(directory)
    assert refused["error"]["code"] == "out_of_memory"
    assert refused["error"]["message"].startswith("Job 'claim-1' is out of memory: its training data")
    assert "max_length" in refused["error"]["remedy"]
    assert "rank" not in refused["error"]["remedy"]


def test_out_of_memory_rejects_the_job_that_the_error_names(
    trainer: MessageHandlers, directory: TrainerDirectory
) -> None:
    trainer.tick()

    (refused,) = events_in(directory)
    assert (refused["type"], refused["claim_id"]) == ("refused", "claim-1")
    assert refused["error"]["code"] == "out_of_memory"
    assert set(trainer._jobs) == {"claim-0"}


class DivergingEngine(FullEngine):
    """An engine in which job claim-1 diverges at step 7."""

    def __init__(self, *, good_step: int) -> None:
        super().__init__()
        self._good_step = good_step
        self.evaluated_step: int | None = None

    def progress(self, job: str) -> tuple[int, int]:
        return 7, 10

    def job(self, _job: str) -> SimpleNamespace:
        return SimpleNamespace(evaluated_step=self.evaluated_step, adapter=SimpleNamespace(num_parameters=24))

    def save_checkpoint(self, job: str, directory: Path) -> None:
        assert job in self._compared, "the weights of the ranks were not compared"
        directory.mkdir(parents=True)

    def export(self, job: str, *given: Any, **_: object) -> None:
        given[0].mkdir()

    def tick(self) -> list[Any]:
        return [JobDiverged(job="claim-1", step=7, good_step=self._good_step, message="The update is not finite.")]


def test_a_diverged_job_saves_its_last_step_and_the_others_stay(
    trainer: MessageHandlers, directory: TrainerDirectory
) -> None:
    trainer.engine = DivergingEngine(good_step=7)  # pyright: ignore[reportAttributeAccessIssue]

    trainer.tick()

    saved, diverged = events_in(directory)
    assert (saved["type"], saved["claim_id"], saved["step"]) == ("checkpointed", "claim-1", 7)
    assert (directory.path / saved["folder"]).is_dir()
    assert (directory.path / saved["adapter"]).is_dir()
    assert saved["num_parameters"] == 24
    assert (diverged["type"], diverged["claim_id"], diverged["step"]) == ("diverged", "claim-1", 7)
    assert set(trainer._jobs) == {"claim-0"}


def test_a_checkpoint_that_cannot_be_exported_is_still_a_checkpoint(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.engine = DivergingEngine(good_step=7)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(trainer.engine, "export", fail)

    trainer._checkpoint("claim-1")

    unexported, saved = events_in(directory)
    assert (unexported["type"], unexported["error"]["code"]) == ("checkpoint_unexported", "out_of_space")
    assert (saved["type"], saved["step"], saved["adapter"]) == ("checkpointed", 7, None)


def leave(
    trainer: MessageHandlers, directory: TrainerDirectory, *verbs: tuple[Verb, str | None]
) -> list[dict[str, Any]]:
    """Send the messages, each a verb and a claim, before one read of the inbox. Return the trainer's events."""
    inbox = InboxWriter(directory)
    for verb, claim_id in verbs:
        inbox.send(verb, **({} if claim_id is None else {"claim_id": claim_id}))
    trainer.read_inbox(begins_answers=True)
    return events_in(directory)


@pytest.mark.parametrize("verbs", [[("drain", None)], [("preempt", "claim-0"), ("pause", "claim-1")]])
def test_all_leaving_jobs_are_saved_before_the_first_is_exported(
    trainer: MessageHandlers,
    directory: TrainerDirectory,
    monkeypatch: pytest.MonkeyPatch,
    verbs: list[tuple[Verb, str | None]],
) -> None:
    engine, reported_before = DivergingEngine(good_step=7), []
    trainer.engine = engine  # pyright: ignore[reportAttributeAccessIssue]
    export = engine.export

    def note(*given: Any, **named: Any) -> None:
        reported_before.append([event["type"] for event in events_in(directory)])
        export(*given, **named)

    monkeypatch.setattr(engine, "export", note)

    events = leave(trainer, directory, *verbs)

    assert reported_before[0] == ["checkpointed"] * 2
    kinds = [(event["type"], event["claim_id"], event["step"]) for event in events]
    jobs = ("claim-0", "claim-1")
    assert kinds == [(kind, job, 7) for kind in ("checkpointed", "paused") for job in jobs]
    assert all((directory.path / event["folder"]).is_dir() and event["adapter"] is None for event in events[:2])
    assert all((directory.path / event["adapter"]).is_dir() for event in events[2:])
    assert not trainer._jobs
    assert trainer.is_exiting == (verbs == [("drain", None)])


def test_messages_after_a_pause_are_applied_after_it(trainer: MessageHandlers, directory: TrainerDirectory) -> None:
    trainer.engine = DivergingEngine(good_step=7)  # pyright: ignore[reportAttributeAccessIssue]

    events = leave(trainer, directory, ("pause", "claim-1"), ("cancel", "claim-0"), ("pause", "claim-9"))

    reported = [(event["type"], event["claim_id"]) for event in events]
    assert reported == [("checkpointed", "claim-1"), ("paused", "claim-1"), ("cancelled", "claim-0")]


def test_kept_weights_of_an_earlier_step_are_not_exported_as_the_last_step(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DivergingEngine(good_step=7)
    engine.evaluated_step = 0
    trainer.engine = engine  # pyright: ignore[reportAttributeAccessIssue]

    saved, paused = leave(trainer, directory, ("pause", "claim-1"))

    assert (saved["type"], saved["step"]) == ("checkpointed", 7)
    assert (paused["type"], paused["adapter"]) == ("paused", None)
    assert [path.name for path in (directory.path / saved["folder"]).parent.iterdir()] == ["step-7"]


def test_weights_that_a_step_made_non_finite_are_not_saved(
    trainer: MessageHandlers, directory: TrainerDirectory
) -> None:
    trainer.engine = DivergingEngine(good_step=6)  # pyright: ignore[reportAttributeAccessIssue]

    trainer.tick()

    (diverged,) = events_in(directory)
    assert (diverged["type"], diverged["step"], diverged["good_step"]) == ("diverged", 7, 6)
    assert not (directory.job_path("claim-1") / "checkpoints").exists()
    assert set(trainer._jobs) == {"claim-0"}


def test_out_of_memory_during_export_rejects_only_that_job(
    trainer: MessageHandlers, directory: TrainerDirectory
) -> None:
    trainer._export(JobFinished(job="claim-1", step=1, kept_step=1))

    (refused,) = events_in(directory)
    assert (refused["claim_id"], refused["error"]["code"]) == ("claim-1", "out_of_memory")
    assert set(trainer._jobs) == {"claim-0"}


def test_an_error_of_one_adapter_rejects_only_that_job(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(trainer.engine, "export", fail)

    trainer._export(JobFinished(job="claim-1", step=1, kept_step=1))

    (refused,) = events_in(directory)
    assert (refused["claim_id"], refused["error"]["code"]) == ("claim-1", "bad_adapter")
    assert "ZeroDivisionError: float division by zero" in refused["error"]["message"]
    assert set(trainer._jobs) == {"claim-0"}


def test_a_device_error_stops_the_trainer_and_rejects_no_job(
    trainer: MessageHandlers, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer.engine, "export", fail)

    with pytest.raises(torch.AcceleratorError):
        trainer._export(JobFinished(job="claim-1", step=1, kept_step=1))

    assert events_in(directory) == []
    assert set(trainer._jobs) == {"claim-0", "claim-1"}


def test_an_error_of_one_adapter_is_printed_as_handled(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadAdapter), outputs._blamed_on_adapter():  # pyright: ignore[reportPrivateUsage]
        raise KeyError("rank")

    printed = capsys.readouterr().err
    assert "KeyError: 'rank'" in printed
    assert without_handled(printed) == ""
