"""A trainer's inference requests: they are claimed, handed over with their adapters, answered, stopped and released."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catalog.errors import OutOfSpace
from catalog.inference import claims, requests
from catalog.resources.pack_key import pack_key
from catalog.tables.inference import MAX_CLAIMS, InferenceRequest
from tests.catalog.world import sha
from tests.worker.inference_requests import ApiProcess, answer, claim_of, received, submit, submit_and_claim
from tests.worker.pack_site import OUTAGE, READY, PackSite, emit
from tests.worker_site import wait_until
from worker.session import inference, reply_connections
from worker.session.capacity import bases_to_load, free_capacity
from worker.session.inference import InferenceSession
from worker.session.reply_connections import ReplyConnections
from worker.session.trainer_session import TrainerSession

KEY = pack_key(sha("smol"), "bfloat16")


def failing(error: Exception) -> Callable[..., None]:
    """Return a function that raises the error."""

    def fail(*_: object) -> None:
        raise error

    return fail


def test_request_is_handed_over_and_its_answer_sent(site: PackSite, session: TrainerSession, api: ApiProcess) -> None:
    row = submit(site, api)

    ((verb, body),) = answer(session)

    assert verb == "answer"
    assert body == {"claim_id": claim_of(site, row), "adapter": None, "messages": [], "model": "smol"}
    assert not session.inference.is_idle
    emit(session, {"type": "answering", "claim_id": claim_of(site, row), "prompt_tokens": 3})
    emit(session, {"type": "generated", "claim_id": claim_of(site, row), "deltas": [{"index": 0, "text": "a"}]})
    emit(session, {"type": "answered", "claim_id": claim_of(site, row), "completion_tokens": 1})
    session.read_events()
    wait_until(lambda: len(api.lines) == 3)
    assert api.types() == ["answering", "generated", "answered"]
    assert api.token == b"secret\n"
    assert {line["request_id"] for line in api.lines} == {row.id}
    assert all(requests.is_held(site.db, row.id, line["claim_id"]) for line in api.lines)
    assert api.lines[0]["event"] == {"type": "answering", "prompt_tokens": 3}
    assert session.inference.is_idle


def test_few_answers_wait_in_the_trainer_so_that_projects_take_turns(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 4)
    first, second, third = (submit(site, api, n=4) for _ in range(3))
    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, first)]
    other = submit(site, api, project_id=site.world.stranger.project_id)
    assert answer(session) == [], "four answers wait"

    deltas = [{"index": index, "text": "a"} for index in range(4)]
    emit(session, {"type": "generated", "claim_id": claim_of(site, first), "deltas": deltas[:1]})
    session.read_events()
    claimed = [body["claim_id"] for _, body in answer(session)]

    assert claimed == [claim_of(site, other)], "the project that has nothing yet is next, and takes the only place"
    for row, begun in ((first, deltas[1:]), (other, deltas[:1])):
        emit(session, {"type": "generated", "claim_id": claim_of(site, row), "deltas": begun})
    session.read_events()
    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, second)]
    assert answer(session) == []
    with site.db.read() as database:
        assert database.get_one(InferenceRequest, third.id).claim_id is None


def test_more_requests_are_claimed_at_once_while_more_wait(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 2)
    monkeypatch.setattr(inference, "POLL_SECONDS", 1000.0)
    rows = [submit(site, api) for _ in range(3)]
    assert len(answer(session)) == 2
    assert answer(session, was_notified=False) == []

    for row in rows[:2]:
        emit(session, {"type": "answered", "claim_id": claim_of(site, row), "completion_tokens": 1})
    session.read_events()

    assert len(answer(session, was_notified=False)) == 1


def test_adapter_is_copied_once_and_kept_for_later_requests(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = site.store.put_folder(site.files("adapter", "adapter_config.json", "{}"), kind="adapter").digest
    fetched: list[Path] = []
    fetch = site.store.fetch
    monkeypatch.setattr(site.store, "fetch", lambda manifest, folder: (fetched.append(folder), fetch(manifest, folder)))
    submit(site, api, adapter=digest)
    submit(site, api, adapter=digest)

    messages = answer(session)

    folders = [body["adapter"] for _, body in messages]
    assert folders == [{"digest": digest, "folder": f"adapters/{digest}"}] * 2
    assert (session.directory.path / folders[0]["folder"] / "adapter_config.json").read_text() == "{}"
    assert len(fetched) == 1


def test_adapters_that_are_not_used_any_more_are_deleted(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "STAGED_ADAPTERS", 2)
    digests = [
        site.store.put_folder(site.files(f"adapter-{number}", "config.json", f"{number}"), kind="adapter").digest
        for number in range(4)
    ]
    _, *others = [submit(site, api, adapter=digest) for digest in digests[:3]]
    answer(session)
    for row in others:
        emit(session, {"type": "answered", "claim_id": claim_of(site, row), "completion_tokens": 1})
    session.read_events()

    submit(site, api, adapter=digests[3])
    answer(session)

    exists = [(session.directory.path / "adapters" / digest).is_dir() for digest in digests]
    assert exists == [True, False, False, True], "the first is still in use"


def test_damaged_adapter_fails_its_request_only(site: PackSite, session: TrainerSession, api: ApiProcess) -> None:
    broken = submit(site, api, adapter=sha("no such artifact"))
    healthy = submit(site, api)

    messages = answer(session)

    assert [body["claim_id"] for _, body in messages] == [claim_of(site, healthy)]
    wait_until(lambda: api.lines)
    assert (api.lines[0]["request_id"], api.types()) == (broken.id, ["unanswered"])


def test_adapter_that_can_not_be_copied_now_delays_only_its_own_requests(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = site.store.put_folder(site.files("adapter", "adapter_config.json", "{}"), kind="adapter").digest
    waiting, other = submit(site, api, adapter=digest), submit(site, api)
    monkeypatch.setattr(inference, "RETRY_SECONDS", 1000.0)
    fetch, tries = site.store.fetch, []
    monkeypatch.setattr(site.store, "fetch", lambda *_: (tries.append(1), failing(OUTAGE)()))

    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, other)]
    assert answer(session) == []
    assert len(tries) == 1, "the next attempt is later"

    monkeypatch.setattr(site.store, "fetch", fetch)
    session.inference._retry_at.clear()
    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, waiting)]


def test_answers_that_wait_for_an_adapter_do_not_count_as_waiting_for_the_trainer(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_WAITING", 1)
    digest = site.store.put_folder(site.files("adapter", "adapter_config.json", "{}"), kind="adapter").digest
    submit(site, api, adapter=digest)
    monkeypatch.setattr(site.store, "fetch", failing(OUTAGE))
    assert answer(session) == []
    other = submit(site, api)

    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, other)]


def test_complete_answers_of_an_open_request_leave_their_places_to_others(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_OPEN", 4)
    first, second = submit(site, api, n=4), submit(site, api)
    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, first)]
    begun = [{"index": index, "text": "a"} for index in range(4)]
    emit(session, {"type": "generated", "claim_id": claim_of(site, first), "deltas": begun})
    session.read_events()
    assert answer(session) == [], "four answers grow"

    complete = {"index": 2, "text": "b", "finish": "stop"}
    emit(session, {"type": "generated", "claim_id": claim_of(site, first), "deltas": [complete]})
    session.read_events()

    assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, second)]


def test_request_whose_adapter_has_no_space_is_left_to_others_and_fails_at_last(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = site.store.put_folder(site.files("adapter", "adapter_config.json", "{}"), kind="adapter").digest
    full = OutOfSpace("The disk is full.", code="disk_full", remedy="Free some space.")
    monkeypatch.setattr(site.store, "fetch", failing(full))
    submit(site, api, adapter=digest)

    for _ in range(MAX_CLAIMS - 1):
        other = submit(site, api)
        assert [body["claim_id"] for _, body in answer(session)] == [claim_of(site, other)]
    assert api.lines == []
    assert answer(session) == []

    wait_until(lambda: api.lines)
    assert [line["event"]["error"]["code"] for line in api.lines] == ["disk_full"]


def test_request_that_its_client_abandoned_is_stopped(site: PackSite, session: TrainerSession, api: ApiProcess) -> None:
    row = submit(site, api)
    answer(session)
    emit(session, {"type": "answering", "claim_id": claim_of(site, row), "prompt_tokens": 3})
    session.read_events()
    wait_until(lambda: api.lines)
    api.stop(row.id)

    found: list[tuple[str, dict[str, Any]]] = []
    wait_until(lambda: found.extend(answer(session)) or found)

    assert found == [("stop_answering", {"claim_id": claim_of(site, row)})]
    assert session.inference.is_idle


def test_requests_of_an_api_process_that_is_gone_are_stopped(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    row = submit(site, api)
    answer(session)
    emit(session, {"type": "answering", "claim_id": claim_of(site, row), "prompt_tokens": 3})
    session.read_events()
    wait_until(lambda: api.lines)
    api.close()

    found: list[tuple[str, dict[str, Any]]] = []
    wait_until(lambda: found.extend(answer(session)) or found)

    assert found == [("stop_answering", {"claim_id": claim_of(site, row)})], "it must wait until its lease expires"


def test_requests_after_a_lost_connection_use_another_one(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        unreachable = f"secret@127.0.0.1:{server.getsockname()[1]}"
        session.inference._connections.send(unreachable, request_id="x", claim_id="y", event={})
        wait_until(lambda: session.inference._connections._connections[unreachable].has_failed)
        server.listen()
        row = submit(site, api)
        with site.db.write() as database:
            database.get_one(InferenceRequest, row.id).reply_to = unreachable

        messages = answer(session)
        emit(session, {"type": "answering", "claim_id": claim_of(site, row), "prompt_tokens": 3})
        session.read_events()

        assert [verb for verb, _ in messages] == ["answer"]
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as lines:
            assert lines.readline() == b"secret\n"
            assert json.loads(lines.readline())["event"]["type"] == "answering"


def test_stale_claim_is_stopped_at_the_next_renewal(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, claim_id = submit_and_claim(site, session, api)
    requests.finish(site.db, row.id, prompt_tokens=0, completion_tokens=0)
    assert answer(session) == [], "the lease is not renewed at every poll"

    session.inference.renew()
    session.inference.renew()

    assert answer(session) == [("stop_answering", {"claim_id": claim_id})]


def test_lease_is_renewed_by_the_heartbeat_until_the_requests_are_released(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    """The session itself may be busy for longer than a lease: it stores checkpoints."""
    row, claim_id = submit_and_claim(site, session, api)
    for _ in range(3):
        site.world.clock.advance(site.settings.lease_seconds - 1)
        site.context.heartbeat.beat()
    assert claims.claim(site.db, worker_id="w2", pack_key=KEY, limit=5, lease_seconds=60) == []
    assert claim_of(site, row) == claim_id

    session.inference.release_all()

    assert session.inference.renew not in site.context.heartbeat.renewals


def test_events_of_an_earlier_claim_are_not_sent_under_the_next_one(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    row, earlier = submit_and_claim(site, session, api)
    requests.release(site.db, row.id, earlier)
    messages = answer(session)
    later = claim_of(site, row)

    emit(session, {"type": "generated", "claim_id": earlier, "deltas": [{"index": 0, "text": "old"}]})
    emit(session, {"type": "answered", "claim_id": earlier, "completion_tokens": 1})
    emit(session, {"type": "answering", "claim_id": later, "prompt_tokens": 3})
    session.read_events()

    assert [(verb, body["claim_id"]) for verb, body in messages] == [("stop_answering", earlier), ("answer", later)]
    wait_until(lambda: api.lines)
    assert [(line["claim_id"], line["event"]["type"]) for line in api.lines] == [(later, "answering")]


def test_leases_are_renewed_while_the_base_model_loads(site: PackSite, api: ApiProcess) -> None:
    submit(site, api)
    session = site.loading_session()
    session.inference = InferenceSession(site.context, KEY)
    session.inference.claim()
    for _ in range(3):
        site.world.clock.advance(site.settings.lease_seconds - 1)
        session.inference.renew()
        assert answer(session) == [], "the trainer is not ready"

    emit(session, READY)
    session.read_events()

    assert [verb for verb, _ in answer(session)] == ["answer"]
    session.inference.release_all()


def test_request_whose_lease_expired_while_the_base_model_loaded_is_handed_over_once(
    site: PackSite, api: ApiProcess
) -> None:
    row = submit(site, api)
    session = site.loading_session()
    session.inference = InferenceSession(site.context, KEY)
    session.inference.claim()
    site.world.clock.advance(site.settings.lease_seconds + 1)
    site.world.worker("w1")
    emit(session, READY)
    session.read_events()

    assert [(verb, body["claim_id"]) for verb, body in answer(session)] == [("answer", claim_of(site, row))]
    session.inference.release_all()


def test_claimed_requests_are_released_when_the_trainer_ends(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    submit(site, api)
    answer(session)

    session.inference.release_all()

    assert len(claims.claim(site.db, worker_id="w1", pack_key=KEY, limit=5, lease_seconds=60)) == 1
    assert session.inference.is_idle
    assert api.lines == []


def test_requests_do_not_join_a_job_that_must_train_alone(site: PackSite, api: ApiProcess) -> None:
    claim = site.claim()
    claim.job.counted_attempts = 2
    session = site.session(claim)
    session.inference = InferenceSession(site.context, KEY)
    submit(site, api)

    assert answer(session) == []

    claim.job.counted_attempts = 0
    assert [verb for verb, _ in answer(session)] == ["answer"]
    session.inference.release_all()


@pytest.mark.parametrize(("is_ready", "num_claims"), [(True, [1, 0]), (False, [1, 1])])
def test_only_a_loading_trainer_counts_for_requests_that_it_has_not_got(
    site: PackSite, api: ApiProcess, monkeypatch: pytest.MonkeyPatch, is_ready: bool, num_claims: list[int]
) -> None:
    digest = site.store.put_folder(site.files("adapter", "adapter_config.json", "{}"), kind="adapter").digest
    monkeypatch.setattr(site.store, "fetch", failing(OUTAGE))
    rows = [submit(site, api), submit(site, api, adapter=digest)]
    session = site.loading_session()
    session.inference = InferenceSession(site.context, KEY)
    session.inference.claim()
    if is_ready:
        emit(session, READY)
        session.read_events()
        answer(session)

    session.inference.release_all()

    with site.db.read() as database:
        assert [database.get_one(InferenceRequest, row.id).num_claims for row in rows] == num_claims


def test_request_that_too_many_workers_could_not_answer_fails(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    row = submit(site, api)
    for _ in range(MAX_CLAIMS - 1):
        (claimed,) = claims.claim(site.db, worker_id="w1", pack_key=KEY, limit=1, lease_seconds=60)
        claims.release(site.db, [claimed.claim_id])
    answer(session)

    session.inference.release_all()

    wait_until(lambda: api.lines)
    (line,) = api.lines
    assert (line["request_id"], line["event"]["error"]["code"]) == (row.id, "inference_failed")


def test_trainer_that_is_to_unload_answers_what_it_has_and_claims_nothing(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submit(site, api)
    answer(session)
    session.inference.stop_claiming()
    submit(site, api)

    assert not session.unload()
    assert answer(session) == []
    emit(session, {"type": "answered", "claim_id": claim_of(site, first), "completion_tokens": 1})
    session.read_events()

    assert session.unload()
    assert received(session) == [("unload", {})]


def test_unload_does_not_wait_for_a_long_answer(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.session.trainer_session.UNLOAD_SECONDS", 0.0)
    submit(site, api)
    answer(session)

    assert session.unload()


def test_base_model_that_does_not_fit_is_not_loaded(site: PackSite, api: ApiProcess) -> None:
    capacity = free_capacity(site.context)
    assert list(bases_to_load(site.context, capacity)) == []
    submit(site, api)

    (wanted,) = bases_to_load(site.context, capacity)

    assert (wanted.base_model, wanted.base_digest, wanted.pack_key) == ("smol", sha("smol"), KEY)
    site.world.base("huge", num_parameters=10**14)
    with site.db.write() as session:
        session.query(InferenceRequest).delete()
    model = requests.resolve(site.db, project_id=site.world.caller.project_id, name="huge")
    requests.submit(site.db, project_id=site.world.caller.project_id, model=model, body={}, reply_to=api.address)
    assert list(bases_to_load(site.context, capacity)) == []


def test_base_model_that_can_not_be_loaded_fails_its_requests(site: PackSite, api: ApiProcess) -> None:
    submit(site, api)
    waiting = InferenceSession(site.context, KEY)
    waiting.claim()

    waiting.fail_all({"code": "unsupported_model", "message": "It can't be loaded.", "remedy": "Use another."})

    wait_until(lambda: api.lines)
    assert api.lines[0]["event"]["error"]["code"] == "unsupported_model"
    assert waiting.is_idle
    waiting.release_all()


def test_unreachable_api_process_delays_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"secret@127.0.0.1:{server.getsockname()[1]}"
    connections = ReplyConnections()

    connections.send(address, request_id="infer-1", claim_id="answer-1", event={"type": "answering"})

    wait_until(lambda: connections.failed() == {address})
    assert "does not receive answers" in caplog.text
    assert "secret" not in caplog.text
    connections.close()


def test_events_that_an_api_process_does_not_read_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply_connections, "MAX_QUEUED_BYTES", 2**20)
    connections = ReplyConnections()
    failed: set[str] = set()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"secret@127.0.0.1:{server.getsockname()[1]}"
        for _ in range(1000):  # 100 MB, more than sockets buffer
            connections.send(address, request_id="infer-1", claim_id="answer-1", event={"text": "x" * 100_000})
            if failed := connections.failed():
                break

    assert failed == {address}
    connections.close()
