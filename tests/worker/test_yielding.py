"""A trainer without jobs is unloaded for requests that wait for another base model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import pytest

from catalog.errors import Unavailable
from catalog.inference import claims
from catalog.resources import memory
from catalog.resources.pack_key import pack_key
from catalog.tables.inference import MAX_CLAIMS, InferenceRequest
from tests.catalog.world import DESCRIPTION, sha
from tests.worker.inference_requests import ApiProcess, answer, claim_of, submit, submit_and_claim
from tests.worker.pack_site import OUTAGE, READY, PackSite, emit
from tests.worker.scripted_trainer import FakeTrainer, Script, cancel_first_job, load_forever, raising
from worker import next_work, supervisor
from worker.background import base_models
from worker.node import devices as node
from worker.session.trainer_session import TrainerSession

GONE_SECONDS, SWITCH_SECONDS, BATCH_SECONDS = 1000.0, 6000.0, 120_000.0
"""Replace those of next_work, of which a slow test may reach the shortest."""


@pytest.fixture
def session(site: PackSite, session: TrainerSession, monkeypatch: pytest.MonkeyPatch) -> TrainerSession:
    """A session without jobs, whose trainer has just loaded `smol`. Another base model is registered as `other`."""
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    monkeypatch.setattr(next_work, "GONE_SECONDS", GONE_SECONDS)
    monkeypatch.setattr(next_work, "SWITCH_SECONDS", SWITCH_SECONDS)
    monkeypatch.setattr(next_work, "BATCH_SECONDS", BATCH_SECONDS)
    site.world.base("other")
    assert answer(session) == []
    return session


def unloads_for(site: PackSite, session: TrainerSession) -> str | None:
    """Return the base model that the trainer is unloaded for now."""
    work = next_work._yield_to(site.context, session)
    if work is None:
        return None
    assert not work.inference.is_idle
    work.inference.give_back()
    return work.first.base_model


def wants(site: PackSite, session: TrainerSession) -> str | None:
    base = next_work._wanted_base(site.context, session)
    return None if base is None else base.base_model


def pass_time(site: PackSite, session: TrainerSession, seconds: float) -> None:
    """Let the trainer and all requests become older."""
    inference = session.inference
    assert inference.ready_at is not None
    inference.ready_at -= seconds
    inference.last_answer_at -= seconds
    inference.last_client_at -= seconds
    with site.db.write() as database:
        for row in database.query(InferenceRequest):
            row.created_at -= seconds


def finish(session: TrainerSession, claim_id: str) -> None:
    emit(session, {"type": "answered", "claim_id": claim_id, "completion_tokens": 1})
    session.read_events()


def test_trainer_without_requests_is_unloaded_at_once(site: PackSite, session: TrainerSession, api: ApiProcess) -> None:
    assert unloads_for(site, session) is None

    submit(site, api, name="other")

    assert unloads_for(site, session) == "other"


def test_trainer_with_clients_stays_claims_no_more_and_finishes_its_answers(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    _, claim_id = submit_and_claim(site, session, api)
    submit(site, api, name="other")
    assert wants(site, session) is None, "it has just begun to answer clients"
    pass_time(site, session, SWITCH_SECONDS / 2)
    answer(session)
    assert wants(site, session) is None
    pass_time(site, session, SWITCH_SECONDS / 2)
    answer(session)

    assert unloads_for(site, session) is None, "an answer is not complete"
    submit(site, api)
    assert answer(session) == []
    finish(session, claim_id)
    assert unloads_for(site, session) == "other"


def test_pause_between_two_requests_of_a_client_shortens_no_stay(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    _, claim_id = submit_and_claim(site, session, api)
    submit(site, api, name="other")
    finish(session, claim_id)
    pass_time(site, session, GONE_SECONDS / 2)
    assert wants(site, session) is None

    pass_time(site, session, GONE_SECONDS / 2)

    assert wants(site, session) == "other", "the client is gone"


def test_request_whose_adapter_cannot_be_copied_holds_up_no_other_base_model(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = site.store.put_folder(site.files("adapter", "adapter_config.json", "{}"), kind="adapter").digest
    monkeypatch.setattr(site.store, "fetch", raising(OUTAGE))
    row = submit(site, api, adapter=digest)
    assert answer(session) == []
    assert claim_of(site, row)
    submit(site, api, name="other")
    pass_time(site, session, SWITCH_SECONDS)

    assert unloads_for(site, session) == "other"


def test_memory_of_answers_on_a_gpu_is_free_for_another_base_model(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = memory.trainer_bytes(DESCRIPTION, "bfloat16") + site.context.group.reserve_bytes
    site.context.device = replace(site.context.device, kind="cuda")
    monkeypatch.setattr(node, "free_bytes", lambda _: 0)
    submit_and_claim(site, session, api)
    submit(site, api, name="other")
    pass_time(site, session, SWITCH_SECONDS)

    for peak_bytes, wanted in ((needed - 1, None), (needed, "other")):
        emit(session, {"type": "memory", "base_bytes": 1, "adapter_bytes": 0, "peak_bytes": peak_bytes})
        session.read_events()
        assert wants(site, session) == wanted


def test_batches_of_another_base_model_wait_for_a_pause(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    _, claim_id = submit_and_claim(site, session, api)
    site.world.move_to_batch(submit(site, api, name="other"))
    finish(session, claim_id)
    pass_time(site, session, SWITCH_SECONDS / 2)
    assert wants(site, session) is None

    pass_time(site, session, SWITCH_SECONDS / 2)

    assert wants(site, session) == "other"


def test_two_batches_of_two_base_models_alternate(site: PackSite, session: TrainerSession, api: ApiProcess) -> None:
    site.world.move_to_batch(submit(site, api))
    site.world.move_to_batch(submit(site, api, name="other"))
    assert len(answer(session)) == 1
    pass_time(site, session, BATCH_SECONDS / 2)
    answer(session)
    assert wants(site, session) is None

    pass_time(site, session, BATCH_SECONDS / 2)

    assert unloads_for(site, session) == "other"


def test_batch_waits_while_another_base_model_has_clients(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    submit_and_claim(site, session, api)
    site.world.move_to_batch(submit(site, api, name="other"))
    pass_time(site, session, BATCH_SECONDS)
    answer(session)

    assert wants(site, session) is None


def test_two_trainers_are_not_unloaded_for_one_base_model(
    site: PackSite, session: TrainerSession, api: ApiProcess
) -> None:
    submit(site, api, name="other")
    submit(site, api, name="other")
    key = pack_key(sha("other"), "bfloat16")
    site.world.worker("w2")
    wanted = next_work._wanted_base(site.context, session)
    assert wanted is not None
    faster = claims.reserve(site.db, worker_id="w2", pack_key=key, lease_seconds=60.0)
    assert faster is not None

    assert next_work._reserved(site.context, wanted) is None
    assert unloads_for(site, session) is None
    submit(site, api)
    assert len(answer(session)) == 1, "it stays, and claims requests"


def test_batch_that_has_just_begun_is_not_cut_off(site: PackSite, session: TrainerSession, api: ApiProcess) -> None:
    site.world.move_to_batch(submit(site, api))
    submit(site, api, name="other")
    assert len(answer(session)) == 1
    assert wants(site, session) is None

    pass_time(site, session, SWITCH_SECONDS)

    assert unloads_for(site, session) == "other"


def test_failed_load_counts_for_all_requests_that_wait(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess
) -> None:
    """Otherwise each of them would cost several loads."""
    rows = [submit(site, api) for _ in range(3)]

    def crashes(trainer: FakeTrainer) -> Generator[None]:
        yield
        trainer.returncode = 1

    trainers = run(crashes)

    assert len(trainers) == MAX_CLAIMS
    with site.db.read() as database:
        assert all(database.get_one(InferenceRequest, row.id).num_claims == MAX_CLAIMS for row in rows)


def test_no_trainer_follows_one_that_still_holds_the_device(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    site.queued()
    rows: list[InferenceRequest] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        assert not rows, "another trainer was launched"
        yield from cancel_first_job(trainer)
        rows.append(submit(site, api, name="other"))
        yield from trainer.listen("unload")
        trainer.is_left_behind = True
        trainer.kill()
        while True:
            yield

    (trainer,) = run(script)

    assert trainer.returncode is None
    with site.db.read() as database:
        row = database.get_one(InferenceRequest, rows[0].id)
    assert (row.claim_id, row.num_claims) == (None, 0)
    assert site.context.heartbeat.renewals == []


def test_internal_error_after_the_reservation_leaves_no_lease_that_is_renewed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    site.queued()

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield from cancel_first_job(trainer)
        submit(site, api, name="other")
        yield from trainer.listen("unload")
        assert site.context.heartbeat.renewals
        monkeypatch.setattr(supervisor, "_conclude", raising(RuntimeError("ours")))

    with pytest.raises(RuntimeError, match="ours"):
        run(script)

    assert site.context.heartbeat.renewals == []


def become_ready(trainer: FakeTrainer) -> None:
    trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})


def answer_one(trainer: FakeTrainer) -> Generator[None]:
    """Load the base model, and answer the first request."""
    become_ready(trainer)
    message = yield from trainer.listen("answer")
    trainer.emit("answered", claim_id=message.body["claim_id"], completion_tokens=1)
    yield


def test_base_model_is_loaded_although_its_first_client_leaves(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess
) -> None:
    """Others wait for the same base model. If each client that leaves ended the load, no client would be answered."""
    first, second = submit(site, api), submit(site, api)

    def script(trainer: FakeTrainer) -> Generator[None]:
        with site.db.write() as database:
            database.delete(database.get_one(InferenceRequest, first.id))
        site.context.heartbeat.beat()
        for _ in range(3):
            yield
        become_ready(trainer)
        message = yield from trainer.listen("answer")
        assert message.body["claim_id"] == claim_of(site, second)
        trainer.emit("answered", claim_id=message.body["claim_id"], completion_tokens=1)
        yield
        site.context.shutdown.set()
        yield

    (trainer,) = run(script)

    assert trainer.returncode == 0


def test_trainer_is_followed_by_one_for_the_base_model_that_it_was_unloaded_for(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    loaded: list[str] = []
    submit(site, api)

    def ensure(_: object, name: str, *__: object, **___: object) -> object:
        loaded.append(name)
        return site.context.settings.bases_dir()

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield from answer_one(trainer)
        if len(loaded) == 2:
            site.context.shutdown.set()
        else:
            monkeypatch.setattr(next_work, "GONE_SECONDS", 0.0)
            other = submit(site, api, name="other")
            yield from trainer.listen("unload")
            claim_of(site, other)
        yield

    monkeypatch.setattr(base_models, "ensure", ensure)
    first, second = run(script)

    assert loaded == ["smol", "other"]
    assert (first.returncode, second.returncode) == (0, 0)
    assert site.context.heartbeat.renewals == []


def test_reserved_request_is_released_if_the_worker_drains_before_the_next_trainer(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    monkeypatch.setattr(next_work, "GONE_SECONDS", 0.0)
    site.world.base("other")
    submit(site, api)
    reserved: list[InferenceRequest] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield from answer_one(trainer)
        reserved.append(submit(site, api, name="other"))
        yield from trainer.listen("unload")
        assert claim_of(site, reserved[0])
        site.context.shutdown.set()

    run(script)

    with site.db.read() as database:
        row = database.get_one(InferenceRequest, reserved[0].id)
    assert (row.claim_id, row.num_claims) == (None, 0)
    assert site.context.heartbeat.renewals == []


def test_reserved_request_is_released_if_the_worker_stops_before_it_loads(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = submit(site, api)
    monkeypatch.setattr(base_models, "ensure", raising(RuntimeError("ours")))

    with pytest.raises(RuntimeError, match="ours"):
        run(load_forever)

    with site.db.read() as database:
        assert database.get_one(InferenceRequest, row.id).claim_id is None
    assert site.context.heartbeat.renewals == []


def test_outage_while_a_base_model_is_reserved_leaves_nothing_behind(
    site: PackSite, session: TrainerSession, api: ApiProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(site, api, name="other")
    before = list(site.context.heartbeat.renewals)
    monkeypatch.setattr(claims, "reserve", raising(OUTAGE))

    with pytest.raises(Unavailable):
        next_work._yield_to(site.context, session)

    assert site.context.heartbeat.renewals == before
