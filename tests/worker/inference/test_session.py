"""A trainer's inference requests: their order, their adapters, their answers, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import OutOfSpace
from tests.catalog.world import sha
from tests.worker.inference_requests import Asked, TrainerEnd, is_fault_noticed
from tests.worker.pack_site import OUTAGE, PackSite
from tests.worker_site import wait_until
from worker.inference import session as inference
from worker.session.trainer_session import TrainerSession

TOKEN = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}


@pytest.fixture
def trainer(session: TrainerSession) -> TrainerEnd:
    return TrainerEnd(session.directory)


@pytest.fixture
def ask(site: PackSite, session: TrainerSession) -> Callable[..., Asked]:
    """Return ask(path, **fields), which sends a request and returns once it is accepted or refused."""
    return lambda *path, **fields: Asked(site, session.inference, *path, **fields).wait_until_accepted()


def adapter(site: PackSite, number: int = 0) -> str:
    """Store an adapter, and return its digest."""
    return site.store.put_folder(site.files(f"a-{number}", "adapter_config.json", f"{number}"), kind="adapter").digest


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_request_is_passed_to_the_trainer_and_its_answer_streamed(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked]
) -> None:
    asked = ask(max_completion_tokens=5, top_logprobs=0, stop=["x"], tools=[{"type": "function"}])

    (message,) = trainer.take()

    assert message.verb == "answer"
    assert message.body["request_id"].startswith("infer-")
    assert {name: value for name, value in message.body.items() if name != "request_id"} == {
        **{"model": "smol", "n": 1, "seed": 1, "temperature": 0.0, "top_p": 1.0, "stop": ["x"]},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 5, "num_logprobs": 0},
        **{"messages": [], "tools": [{"type": "function"}], "adapter": None},
    }
    assert (session.inference.is_idle, session.inference.has_clients) == (False, True)
    trainer.begin(message)
    trainer.answer(message, {"text": "a", "logprobs": [TOKEN], "finish": "stop"})
    assert asked.chunks == [
        {
            "choices": [],
            "usage": {"prompt_tokens": 3, "completion_tokens": 0},
            "generation": {"text": {"end_ids": [0]}},
        },
        {
            "choices": [
                {"index": 0, "finish_reason": "stop", "delta": {"content": "a"}, "logprobs": {"content": [TOKEN]}}
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        },
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
    ]
    assert asked.events[-1] == "data: [DONE]"
    assert session.inference.is_idle


def test_text_completion_has_the_older_format_of_log_probabilities(
    trainer: TrainerEnd, ask: Callable[..., Asked]
) -> None:
    asked = ask("/v1/completions", prompt=["b"], logprobs=1)
    (message,) = trainer.take()
    assert (message.body["prompts"], message.body["num_logprobs"], message.body["max_tokens"]) == (["b"], 1, 4)
    trainer.generate(message, {"text": "a", "logprobs": [TOKEN]})
    trainer.answer(message, {"text": "a", "logprobs": [TOKEN], "finish": "length"})

    found = [choice for chunk in asked.chunks for choice in chunk["choices"]]

    assert [choice["text"] for choice in found] == ["a", "a"]
    assert [choice["logprobs"]["text_offset"] for choice in found] == [[0], [1]]
    assert found[0]["logprobs"]["top_logprobs"] == [{"a": -0.5}]


def test_few_answers_wait_in_the_trainer_so_that_tenants_take_turns(
    trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 1)
    for number in range(3):
        ask(tenant="a", model=f"a{number}")
    ask(tenant="b", model="b0")
    order: list[str] = []
    for _ in range(4):
        (message,) = trainer.take()
        assert trainer.takes_nothing()
        order.append(message.body["model"])
        trainer.generate(message, {"text": "x"})

    assert order == ["a0", "a1", "b0", "a2"], "a1 was next when b came"


def test_complete_answers_of_an_open_request_leave_their_places_to_others(
    trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_OPEN", 2)
    ask(n=2)
    ask()
    (message,) = trainer.take()
    trainer.generate(message, {"index": 0, "text": "x"}, {"index": 1, "text": "x"})
    assert trainer.takes_nothing()

    trainer.generate(message, {"index": 1, "finish": "stop"})

    assert len(trainer.take()) == 1


def test_batches_come_after_clients_and_take_half_of_the_places(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_BATCH_OPEN", 1)
    ask(priority=1, model="batch0")
    (of_batch,) = trainer.take()
    assert of_batch.body["is_batch"]
    assert not session.inference.has_clients
    ask(priority=1, model="batch1")
    ask(model="client")
    (of_client,) = trainer.take()
    assert (of_client.body["model"], "is_batch" in of_client.body) == ("client", False)

    trainer.answer(of_batch)

    assert [message.body["model"] for message in trainer.take()] == ["batch1"]


def test_request_of_a_client_that_disconnects_is_stopped(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 1)
    first, second = ask(), ask()
    (message,) = trainer.take()

    second.disconnect()
    first.disconnect()

    (stopped,) = trainer.take()
    assert (stopped.verb, stopped.body) == ("stop_answering", {"request_id": message.body["request_id"]})
    wait_until(lambda: session.inference.is_idle)
    trainer.generate(message, {"text": "late"})
    assert trainer.takes_nothing(), "the other request never reached the trainer"


def test_adapter_is_copied_once_and_kept_for_later_requests(
    site: PackSite,
    session: TrainerSession,
    trainer: TrainerEnd,
    ask: Callable[..., Asked],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = adapter(site)
    fetched: list[Path] = []
    fetch = site.store.fetch
    monkeypatch.setattr(site.store, "fetch", lambda manifest, folder: (fetched.append(folder), fetch(manifest, folder)))
    ask(adapter=digest)
    ask(adapter=digest)

    folders = [message.body["adapter"] for message in trainer.take(2)]

    assert folders == [{"digest": digest, "folder": f"adapters/{digest}"}] * 2
    assert (session.directory.path / folders[0]["folder"] / "adapter_config.json").read_text() == "0"
    assert len(fetched) == 1


def test_adapters_that_are_not_used_any_more_are_deleted(
    site: PackSite,
    session: TrainerSession,
    trainer: TrainerEnd,
    ask: Callable[..., Asked],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inference, "STAGED_ADAPTERS", 2)
    digests = [adapter(site, number) for number in range(4)]
    for digest in digests[:3]:
        ask(adapter=digest)
        (message,) = trainer.take()
        if digest != digests[0]:
            trainer.answer(message)
    wait_until(lambda: len(session.inference._open) == 1)

    ask(adapter=digests[3])
    trainer.take()

    exists = [(session.directory.path / "adapters" / digest).is_dir() for digest in digests]
    assert exists == [True, False, False, True], "the first is still in use"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, "artifact_damaged"),
        (OUTAGE, "store_unavailable"),
        (OutOfSpace(ErrorText(code="out_of_space", message="Full.", remedy="Free some.")), "out_of_space"),
        (OSError("broken"), "disk_error"),
    ],
)
def test_adapter_that_can_not_be_copied_fails_its_request_only(
    site: PackSite,
    trainer: TrainerEnd,
    ask: Callable[..., Asked],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    code: str,
) -> None:
    digest = sha("no such artifact") if error is None else adapter(site)
    with monkeypatch.context() as patch:
        if error is not None:
            patch.setattr(site.store, "fetch", failing(error))
        broken = ask(adapter=digest)
        assert (broken.error["code"], bool(broken.error["remedy"])) == (code, True)
    ask()
    assert [message.body["adapter"] for message in trainer.take()] == [None]
    if error is not None:
        ask(adapter=digest)
        assert [message.body["adapter"]["digest"] for message in trainer.take()] == [digest], "it is tried again"


def test_no_request_joins_a_job_that_must_train_alone(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked]
) -> None:
    session.inference.regulate(has_suspect=True)
    ask()
    assert trainer.takes_nothing()

    session.serve_requests()

    assert len(trainer.take()) == 1


def test_trainer_that_yields_gets_no_more_requests_and_finishes_its_answers(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 1)
    begun, waiting = ask(), ask()
    (message,) = trainer.take()

    session.inference.regulate(is_yielding=True)

    assert ask().status == 503
    assert waiting.error["code"] == "not_begun"
    trainer.answer(message, {"text": "a", "finish": "stop"})
    assert begun.chunks
    assert begun.events[-1] == "data: [DONE]"


def test_unloading_interrupts_what_has_begun_and_returns_what_waits(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 1)
    begun, waiting = ask(), ask()
    trainer.take()

    session.inference.stop_accepting()

    assert waiting.error["code"] == "not_begun"
    assert ask().status == 503
    assert not session.inference.is_idle
    session.inference.close()
    assert begun.error["code"] == "answer_interrupted"
    session.inference.close()


@pytest.mark.parametrize(
    "event",
    [
        {"type": "generated", "request_id": []},
        {"type": "generated", "deltas": [{"text": "no index", "num_tokens": 1}]},
        {"type": "generated", "deltas": [{"index": 0, "text": 1, "num_tokens": 1}]},
        {"type": 1},
    ],
)
def test_malformed_event_makes_the_trainer_suspect(
    session: TrainerSession, trainer: TrainerEnd, event: dict[str, Any]
) -> None:
    trainer.write_raw(event)

    wait_until(lambda: is_fault_noticed(session))


def test_events_of_answers_show_that_the_trainer_is_active(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked]
) -> None:
    ask()
    (message,) = trainer.take()
    session.last_event_at = 0.0
    session.serve_requests()
    began = session.last_event_at
    assert began > 0.0

    trainer.begin(message)

    def is_later() -> bool:
        session.serve_requests()
        return session.last_event_at > began

    wait_until(is_later)


def test_answer_without_a_reader_is_abandoned(
    session: TrainerSession, trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_QUEUED_BYTES", 10)
    ask()
    (message,) = trainer.take()

    trainer.generate(message, {"text": "longer than ten bytes"})

    assert [stopped.verb for stopped in trainer.take()] == ["stop_answering"]
    wait_until(lambda: session.inference.is_idle)


def test_waiting_request_is_reported_as_waiting(
    trainer: TrainerEnd, ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "WAITING_SECONDS", 0.01)
    asked = ask()

    wait_until(lambda: ": waiting" in asked.events)
    (message,) = trainer.take()
    trainer.answer(message)
    assert asked.chunks
