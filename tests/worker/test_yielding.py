"""A trainer without jobs is unloaded for requests that wait for another base model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import Unavailable
from catalog.inference import engines
from catalog.resources.memory import BaseModelMemory
from catalog.tables.serving import WantedBase
from catalog.tables.tasks import Task
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskKind
from tests.catalog.world import DESCRIPTION
from tests.worker.inference_requests import Asked, TrainerEnd, want
from tests.worker.pack_site import OUTAGE, READY, PackSite, emit
from tests.worker.scripted_trainer import FakeTrainer, Script, cancel_first_job, load_forever, raising
from tests.worker_site import wait_until
from worker import next_work, supervisor
from worker.background import base_models
from worker.background.child_task import AttemptFailed
from worker.node import devices as node
from worker.protocol.mailbox import TrainerMessage
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
    monkeypatch.setattr(engines, "WANTED_SECONDS", 10 * BATCH_SECONDS)
    site.world.base("other")
    return session


@pytest.fixture
def trainer(session: TrainerSession) -> TrainerEnd:
    return TrainerEnd(session.directory)


def ask(site: PackSite, session: TrainerSession, trainer: TrainerEnd, *, priority: int = 0) -> TrainerMessage:
    """Return the message of a request that the trainer has begun to answer."""
    Asked(site, session.inference, priority=priority).wait_until_accepted()
    (message,) = trainer.take()
    trainer.begin(message)
    return message


def finish(session: TrainerSession, trainer: TrainerEnd, message: TrainerMessage) -> None:
    trainer.answer(message)
    wait_until(lambda: session.inference.is_idle)


def unloads_for(site: PackSite, session: TrainerSession) -> str | None:
    """Return the base model that the trainer is unloaded for now."""
    work = next_work._yield_to(site.context, session)
    if work is None:
        return None
    work.give_back()
    return work.first.base_model


def wants(site: PackSite, session: TrainerSession) -> str | None:
    base = next_work._wanted_base(site.context, session)
    return None if base is None else base.base_model


def pass_time(site: PackSite, session: TrainerSession, seconds: float) -> None:
    """Let the trainer and all requests become older."""
    inference = session.inference
    assert inference.ready_at is not None
    inference.ready_at -= seconds
    inference._last_answer_at -= seconds
    inference._last_client_at -= seconds
    with site.db.write() as database:
        for row in database.query(WantedBase):
            row.wanted_since -= seconds


def task_of(site: PackSite) -> Task | None:
    with site.db.read() as database:
        return database.query(Task).where(Task.kind == TaskKind.LOAD).one_or_none()


def is_released(site: PackSite) -> bool:
    """Return whether another worker may load the wanted base model, without an attempt that counts."""
    task = task_of(site)
    assert task is not None
    return (task.claim_id, task.num_attempts) == (None, 0) and site.context.heartbeat.renewals == []


def test_trainer_without_requests_is_unloaded_at_once(site: PackSite, session: TrainerSession) -> None:
    assert unloads_for(site, session) is None

    want(site, name="other")

    assert unloads_for(site, session) == "other"


def test_trainer_with_clients_stays_accepts_no_more_and_finishes_its_answers(
    site: PackSite, session: TrainerSession, trainer: TrainerEnd
) -> None:
    message = ask(site, session, trainer)
    want(site, name="other")
    assert wants(site, session) is None, "it has just begun to answer clients"
    pass_time(site, session, SWITCH_SECONDS / 2)
    assert wants(site, session) is None
    pass_time(site, session, SWITCH_SECONDS / 2)

    assert unloads_for(site, session) is None, "an answer is not complete"
    assert Asked(site, session.inference).wait_until_accepted().status == 503
    finish(session, trainer, message)
    assert unloads_for(site, session) == "other"


def test_pause_between_two_requests_of_a_client_shortens_no_stay(
    site: PackSite, session: TrainerSession, trainer: TrainerEnd
) -> None:
    message = ask(site, session, trainer)
    want(site, name="other")
    finish(session, trainer, message)
    pass_time(site, session, GONE_SECONDS / 2)
    assert wants(site, session) is None

    pass_time(site, session, GONE_SECONDS / 2)

    assert wants(site, session) == "other", "the client is gone"


def test_memory_of_answers_on_a_gpu_is_free_for_another_base_model(
    site: PackSite, session: TrainerSession, trainer: TrainerEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes() + site.context.group.reserve_bytes
    site.context.device = replace(site.context.device, kind="cuda")
    monkeypatch.setattr(node, "free_bytes", lambda _: 0)
    ask(site, session, trainer)
    want(site, name="other")
    pass_time(site, session, SWITCH_SECONDS)

    for peak_bytes, wanted in ((needed - 1, None), (needed, "other")):
        emit(session, {"type": "memory", "base_bytes": 1, "adapter_bytes": 0, "peak_bytes": peak_bytes})
        session.read_events()
        assert wants(site, session) == wanted


def test_batches_of_another_base_model_wait_for_a_pause(
    site: PackSite, session: TrainerSession, trainer: TrainerEnd
) -> None:
    message = ask(site, session, trainer)
    want(site, name="other", is_batch=True)
    finish(session, trainer, message)
    pass_time(site, session, SWITCH_SECONDS / 2)
    assert wants(site, session) is None

    pass_time(site, session, SWITCH_SECONDS / 2)

    assert wants(site, session) == "other"


def test_two_batches_of_two_base_models_alternate(site: PackSite, session: TrainerSession, trainer: TrainerEnd) -> None:
    ask(site, session, trainer, priority=1)
    want(site, name="other", is_batch=True)
    pass_time(site, session, BATCH_SECONDS / 2)
    assert wants(site, session) is None

    pass_time(site, session, BATCH_SECONDS / 2)

    assert unloads_for(site, session) == "other"


def test_batch_waits_while_another_base_model_has_clients(
    site: PackSite, session: TrainerSession, trainer: TrainerEnd
) -> None:
    ask(site, session, trainer)
    want(site, name="other", is_batch=True)
    pass_time(site, session, BATCH_SECONDS)

    assert wants(site, session) is None


def test_batch_that_has_just_begun_is_not_cut_off(site: PackSite, session: TrainerSession, trainer: TrainerEnd) -> None:
    ask(site, session, trainer, priority=1)
    want(site, name="other")
    assert wants(site, session) is None

    pass_time(site, session, SWITCH_SECONDS)

    assert unloads_for(site, session) == "other"


def test_two_trainers_are_not_unloaded_for_one_base_model(
    site: PackSite, session: TrainerSession, trainer: TrainerEnd
) -> None:
    key = want(site, name="other")
    site.world.worker("w2")
    wanted = next_work._wanted_base(site.context, session)
    assert wanted is not None
    faster = engines.reserve(site.db, key, worker_id="w2", lease_seconds=60.0)
    assert faster is not None

    assert next_work._reserved(site.context, wanted) is None
    assert unloads_for(site, session) is None
    ask(site, session, trainer)


def test_load_that_crashes_is_repeated_a_few_times_and_then_fails(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]]
) -> None:
    want(site)

    def crashes(trainer: FakeTrainer) -> Generator[None]:
        yield
        trainer.returncode = 1

    for _ in range(MAX_ATTEMPTS[TaskKind.LOAD]):
        run(crashes)
        site.world.clock.now += 3600.0
        with site.db.write() as database:
            database.query(WantedBase).one().wanted_until += 3600.0
    trainers = run(crashes)

    assert len(trainers) == MAX_ATTEMPTS[TaskKind.LOAD]
    with site.db.read() as database:
        row = database.query(WantedBase).one()
    assert row.error is not None
    assert row.error["message"].endswith("All 3 attempts have failed.")
    assert task_of(site) is None


def test_refused_import_fails_the_requests_with_its_error(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    want(site)
    refusal = AttemptFailed(
        ErrorText(code="artifact_damaged", message="The files are damaged.", remedy="Import it again.")
    )
    monkeypatch.setattr(base_models, "ensure", raising(refusal))

    assert run(load_forever) == []

    with site.db.read() as database:
        error = database.query(WantedBase).one().error
    assert error == {"code": "artifact_damaged", "message": "The files are damaged.", "remedy": "Import it again."}


def test_no_trainer_follows_one_that_still_holds_the_device(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    site.queued()

    def script(trainer: FakeTrainer) -> Generator[None]:
        assert task_of(site) is None, "another trainer was launched"
        yield from cancel_first_job(trainer)
        want(site, name="other")
        yield from trainer.listen("unload")
        trainer.is_left_behind = True
        trainer.kill()
        while True:
            yield

    (trainer,) = run(script)

    assert trainer.returncode is None
    assert is_released(site)


def test_internal_error_after_the_reservation_leaves_no_lease_that_is_renewed(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    site.queued()

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield from cancel_first_job(trainer)
        want(site, name="other")
        yield from trainer.listen("unload")
        assert site.context.heartbeat.renewals
        monkeypatch.setattr(supervisor, "_conclude", raising(RuntimeError("ours")))

    with pytest.raises(RuntimeError, match="ours"):
        run(script)

    assert site.context.heartbeat.renewals == []


def become_ready(trainer: FakeTrainer) -> None:
    trainer.emit("ready", **{name: value for name, value in READY.items() if name != "type"})


def test_trainer_is_announced_once_it_is_ready_and_its_task_is_done(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]]
) -> None:
    key = want(site)
    addresses: list[str] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        yield
        task = task_of(site)
        assert task is not None
        assert task.claim_id
        assert engines.trainers_of(site.db, key)[0] == []
        become_ready(trainer)
        while task_of(site) is not None:
            yield
        site.context.heartbeat.beat()
        addresses.extend(each.address for each in engines.trainers_of(site.db, key)[0])
        site.context.shutdown.set()
        yield

    (trainer,) = run(script)

    assert trainer.returncode == 0
    assert addresses == [site.context.inference_server.address]
    assert engines.trainers_of(site.db, key)[0] == [], "it has ended"


def test_trainer_is_followed_by_one_for_the_base_model_that_it_was_unloaded_for(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    loaded: list[str] = []
    want(site)

    def ensure(_: object, name: str, *__: object, **___: object) -> object:
        loaded.append(name)
        return site.context.settings.bases_dir()

    def script(trainer: FakeTrainer) -> Generator[None]:
        become_ready(trainer)
        while task_of(site) is not None:
            yield
        if len(loaded) == 2:
            site.context.shutdown.set()
        else:
            want(site, name="other")
            yield from trainer.listen("unload")
        yield

    monkeypatch.setattr(base_models, "ensure", ensure)
    first, second = run(script)

    assert loaded == ["smol", "other"]
    assert (first.returncode, second.returncode) == (0, 0)
    assert site.context.heartbeat.renewals == []


def test_reserved_load_is_released_if_the_worker_drains_before_the_next_trainer(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_work, "FREE_WORKER_POLLS", 0.0)
    site.world.base("other")
    want(site)

    def script(trainer: FakeTrainer) -> Generator[None]:
        become_ready(trainer)
        while task_of(site) is not None:
            yield
        want(site, name="other")
        yield from trainer.listen("unload")
        task = task_of(site)
        assert task is not None
        assert task.claim_id
        site.context.shutdown.set()

    run(script)

    assert is_released(site)


def test_reserved_load_is_released_if_the_worker_stops_before_it_loads(
    site: PackSite, run: Callable[[Script], list[FakeTrainer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    want(site)
    monkeypatch.setattr(base_models, "ensure", raising(RuntimeError("ours")))

    with pytest.raises(RuntimeError, match="ours"):
        run(load_forever)

    assert is_released(site)


def test_outage_while_a_base_model_is_reserved_leaves_nothing_behind(
    site: PackSite, session: TrainerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    want(site, name="other")
    before = list(site.context.heartbeat.renewals)
    monkeypatch.setattr(engines, "reserve", raising(OUTAGE))

    with pytest.raises(Unavailable):
        next_work._yield_to(site.context, session)

    assert site.context.heartbeat.renewals == before
