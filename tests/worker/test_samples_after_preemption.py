"""A job that leaves while it answers its prompts gives the answers after it resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog.lifecycle import recording
from catalog.spec.job import JobRequest, resolve
from tests import tiny_base
from tests.worker.pack_site import PackSite, emit_for, events_in
from tests.worker.trainer_settings import trainer_settings
from worker.children.tokenizer.token_file import TokenFile
from worker.children.trainer.main import load_engine
from worker.children.trainer.message_handlers import MessageHandlers
from worker.protocol.mailbox import AdmitBody, EventWriter, InboxReader, InboxWriter, TrainerDirectory

CLAIM = "claim-1"
PROMPTS = {"prompts": ["What color is the lorry?"], "max_tokens": 3}


@pytest.fixture
def directory(tmp_path: Path) -> TrainerDirectory:
    settings = trainer_settings(tiny_base.make(tmp_path / "base"))
    directory = TrainerDirectory.create(tmp_path / "trainer", settings)
    directory.job_path(CLAIM).mkdir(parents=True)
    with TokenFile(directory.job_path(CLAIM) / "tokens.safetensors") as tokens:
        for row in range(4):
            tokens.add_row(np.arange(20, dtype=np.int32) + row, (np.arange(20) >= 10).astype(np.uint8))
        tokens.finish()
    return directory


@pytest.fixture
def trainer(directory: TrainerDirectory) -> Iterator[MessageHandlers]:
    events = EventWriter(directory)
    trainer = MessageHandlers(directory, load_engine(directory, events), events)
    yield trainer
    trainer.events.close()


def body(*, resume: str | None = None, answered_steps: Sequence[int] = ()) -> AdmitBody:
    """Return the body of the `admit` message of a job with three steps that is evaluated at each."""
    requested = {"model": "tiny", "training_file": "f", "validation_file": "v", "evaluation": {"samples": PROMPTS}}
    spec = resolve(JobRequest.model_validate(requested), num_rows=4, max_positions=256, seed=1)
    tokens = f"jobs/{CLAIM}/tokens.safetensors"
    return {
        "claim_id": CLAIM,
        "job_id": "ftjob-1",
        "base_name": "tiny",
        "base_revision": None,
        "spec": spec.model_dump(mode="json"),
        "num_steps": 3,
        "evaluate_every_steps": 1,
        "checkpoint_every_steps": 9,
        "answered_steps": list(answered_steps),
        "asks_as_chat": True,
        "shortages": 0,
        "train": tokens,
        "valid": tokens,
        "resume": resume,
        "parent": None,
        "trace": None,
    }


def answered(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events if event["type"] == "sampled"]


def pause_while_answering(trainer: MessageHandlers, directory: TrainerDirectory, *, step: int) -> list[dict[str, Any]]:
    """Pause the job while it answers at that step, and return its events."""
    trainer._admit(body())
    while trainer.engine.progress(CLAIM)[0] < step:
        trainer.tick()
    InboxWriter(directory).send("pause", claim_id=CLAIM)
    while CLAIM in trainer._jobs:
        trainer.tick()
    return events_in(directory)


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("step", [1, 3])
def test_only_answers_that_a_pause_cut_off_are_given_after_the_resume(
    trainer: MessageHandlers, directory: TrainerDirectory, step: int
) -> None:
    before = pause_while_answering(trainer, directory, step=step)
    saved, paused = before[-2:]
    assert (saved["type"], saved["step"]) == ("checkpointed", step)
    assert (paused["type"], paused["step"]) == ("paused", step)
    assert answered(before) == list(range(step))

    trainer._admit(body(resume=saved["folder"], answered_steps=answered(before)))
    owed = events_in(directory)[len(before) :]

    assert [event["type"] for event in owed] == ["admitted", "sampled"]
    assert answered(owed) == [step]
    trainer._evict(CLAIM)
    trainer._admit(body(resume=saved["folder"], answered_steps=answered([*before, *owed])))
    assert events_in(directory)[-1]["type"] == "admitted"


def test_a_trainer_receives_the_steps_with_recorded_answers(site: PackSite) -> None:
    claim = site.claim(validation_file=site.world.file(), evaluation={"samples": PROMPTS})
    session = site.session(claim)
    emit_for(
        session,
        claim,
        "sampled",
        step=2,
        samples=[{"prompt": "a", "answer": "b", "num_tokens": 1, "is_complete": True}],
    )
    recording.record_event(site.db, claim.claim_id, "info", "Another event.", {"step": 1})
    session.read_events()

    session._held[claim.claim_id].is_handed_over = False
    session.hand_over()

    (message,) = InboxReader(session.directory).take()
    assert message.body["answered_steps"] == [2]
    assert json.dumps(message.body)


@pytest.mark.parametrize("reason", ["The loss did not fall.", None])
def test_an_early_stop_is_recorded_while_the_job_is_verified(site: PackSite, reason: str | None) -> None:
    claim = site.claim()
    session = site.session(claim)

    emit_for(session, claim, "finished", step=6, kept_step=4, stopped_early=reason)
    session.read_events()

    progress = site.world.job(claim.job.id).progress
    assert progress is not None
    assert progress["stopped_early"] == reason
