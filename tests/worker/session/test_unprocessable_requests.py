"""An inference request that a worker can't read or write fails alone, and never the worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from catalog.inference import claims, requests
from catalog.resources.pack_key import pack_key
from catalog.states import EndReason
from catalog.tables.inference import InferenceRequest
from tests.catalog.inference.test_requests import make_unreadable
from tests.catalog.world import sha
from tests.worker.inference_requests import ApiProcess, answer, claim_of, submit
from tests.worker.pack_site import READY, PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script, reasons
from tests.worker_site import wait_until
from worker.protocol.mailbox import InboxWriter
from worker.session import inference
from worker.session.inference import InferenceSession
from worker.session.trainer_session import TrainerSession

KEY = pack_key(sha("smol"), "bfloat16")


def failures(api: ApiProcess) -> list[tuple[str, str]]:
    """Return request and code of each error that the API process has received."""
    return [(line["request_id"], line["event"]["error"]["code"]) for line in api.lines]


def test_request_that_can_not_be_read_fails_and_others_are_handed_over(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    unreadable, other = submit(site, api), submit(site, api)
    make_unreadable(site.world, unreadable)

    messages = answer(session)

    assert [body["claim_id"] for _, body in messages] == [claim_of(site, other)]
    wait_until(lambda: api.lines)
    assert failures(api) == [(unreadable.id, "unprocessable_request")]
    assert api.lines[0]["event"]["error"]["remedy"]


@pytest.mark.parametrize("error", [RecursionError("too deep"), ValueError("no JSON"), TypeError("no argument")])
def test_request_that_can_not_be_written_fails_and_others_are_handed_over(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    unwritable, other = submit(site, api, n=2), submit(site, api)
    send = InboxWriter.send

    def failing(inbox: InboxWriter, verb: Any, **body: Any) -> None:
        if body.get("n") == 2:
            raise error
        send(inbox, verb, **body)

    monkeypatch.setattr(InboxWriter, "send", failing)

    messages = answer(session)

    assert [body["claim_id"] for _, body in messages] == [claim_of(site, other)]
    wait_until(lambda: api.lines)
    assert failures(api) == [(unwritable.id, "unprocessable_request")]
    assert answer(session) == []


def test_base_model_is_not_loaded_for_a_request_that_can_not_be_read(site: PackSite, api: ApiProcess) -> None:
    row = submit(site, api)
    make_unreadable(site.world, row)
    waiting = InferenceSession(site.context, KEY)

    assert not waiting.reserve()

    waiting.release_all()
    wait_until(lambda: api.lines)
    assert failures(api) == [(row.id, "unprocessable_request")]


def test_worker_and_its_job_continue_after_a_request_that_can_not_be_passed_on(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "POLL_SECONDS", 0.0)
    job = site.queued()
    row: list[InferenceRequest] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})
        claim_id = (yield from trainer.listen("admit")).body["claim_id"]
        row.append(submit(site, api, claim_id="two values for one argument"))
        with site.db.write() as database:
            database.get_one(InferenceRequest, row[0].id).pack_key = job.pack_key
        deadline = time.monotonic() + 60
        while not failures(api) and time.monotonic() < deadline:
            time.sleep(0.01)
            yield
        trainer.emit("cancelled", claim_id=claim_id)
        yield

    (trainer,) = run(script)

    assert not trainer.is_killed
    assert reasons(site, job.id) == [EndReason.CANCELLED_BY_USER]
    assert failures(api) == [(row[0].id, claims.UNPROCESSABLE["code"])]
    requests.finish(site.db, row[0].id, prompt_tokens=0, completion_tokens=0)
