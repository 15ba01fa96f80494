"""Base models that requests wait for: one worker loads each of them, and a trainer that has it is found."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import StaleClaim
from catalog.fleet import cordons, workers
from catalog.inference import engines, requests
from catalog.inference.engines import LOAD_FAILED, RESTART_SECONDS, WANTED_SECONDS
from catalog.inference.requests import Model, NoWorker
from catalog.queue import notifier
from catalog.resources.pack_key import pack_key
from catalog.tables.serving import WantedBase
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskClaim, TaskKind
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import LEASE, World, sha

pytestmark = pytest.mark.both_databases
KEY = pack_key(sha("smol"), "bfloat16")
ERROR = {"code": "base_broken", "message": "It is broken.", "remedy": "Repair it."}


@pytest.fixture
def world(world: World) -> World:
    world.worker()
    return world


def model(world: World, name: str = "smol") -> Model:
    return requests.resolve(world.db, project_id=world.caller.project_id, name=name)


def want(world: World, name: str = "smol", *, since: float | None = None, is_batch: bool = False) -> Any:
    """since: when the request began to wait; now if None."""
    since = world.clock.now if since is None else since
    return engines.want(world.db, model(world, name), since=since, is_batch=is_batch)


def wanted(world: World, worker_id: str = "w1", **given: Any) -> list[str]:
    return [row.base_model for row in engines.wanted(world.db, worker_id=worker_id, **given)]


def reserve(world: World, worker_id: str = "w1") -> TaskClaim | None:
    return engines.reserve(world.db, KEY, worker_id=worker_id, lease_seconds=LEASE)


def reserved(world: World, worker_id: str = "w1") -> TaskClaim:
    claimed = reserve(world, worker_id)
    assert claimed is not None
    return claimed


def found(world: World, key: str = KEY) -> list[tuple[str, str, str]]:
    trainers, _ = engines.trainers_of(world.db, key)
    return [(each.trainer_id, each.address, each.secret) for each in trainers]


LOADED = ("trainer-w1", "w1:1", "secret of w1")


def test_wanted_base_model_is_work_until_a_worker_loads_it(world: World) -> None:
    assert (wanted(world), notifier.has_work(world.db)) == ([], False)

    assert want(world) is None
    want(world)

    assert (wanted(world), notifier.has_work(world.db)) == (["smol"], True)
    claimed = reserved(world)
    assert (wanted(world), notifier.has_work(world.db)) == ([], False)
    world.load(KEY)
    engines.note_loaded(world.db, claimed)
    want(world)
    assert wanted(world) == []


def test_one_worker_loads_a_base_model(world: World) -> None:
    want(world)
    world.worker("w2")

    first = reserved(world)

    assert reserve(world, "w2") is None
    task_queue.release(world.db, first)
    again = reserved(world, "w2")
    world.clock.advance(LEASE + 1)
    world.worker()
    assert reserved(world).num_attempts == again.num_attempts + 1, "the lease of w2 has expired"
    with pytest.raises(StaleClaim):
        engines.note_loaded(world.db, again)
    with pytest.raises(StaleClaim):
        outcomes.retry(world.db, again, engines.LOAD, LOAD_FAILED)


def test_cordoned_worker_loads_nothing(world: World) -> None:
    want(world)
    cordons.cordon(world.db, "w1", reason="a fan is loud")

    assert wanted(world) == []
    assert reserve(world) is None


def test_base_model_is_not_wanted_any_more_when_no_request_repeats_it(world: World) -> None:
    want(world)
    world.clock.advance(WANTED_SECONDS - 1)
    assert wanted(world) == ["smol"]

    world.clock.advance(2)

    assert wanted(world) == []
    want(world)
    assert wanted(world, waited_seconds=1.0) == [], "it is wanted again"


def test_base_models_of_clients_are_first_and_then_the_oldest(world: World) -> None:
    for name in ("a", "b", "c"):
        world.base(name)
    want(world, is_batch=True)
    for name in ("b", "a"):
        want(world, name)
    want(world, "c", is_batch=True)
    want(world, "b", is_batch=True)

    assert wanted(world) == ["b", "a", "smol", "c"]
    assert wanted(world, with_batches=False) == ["b", "a"]


def test_client_who_has_left_wants_nothing_although_a_batch_still_does(world: World) -> None:
    want(world)
    world.clock.advance(WANTED_SECONDS - 1)
    want(world, is_batch=True)
    assert wanted(world, with_batches=False) == ["smol"]

    world.clock.advance(2)

    assert (wanted(world, with_batches=False), wanted(world)) == ([], ["smol"])


def test_base_model_that_is_not_wanted_for_long_does_not_count(world: World) -> None:
    want(world)
    assert wanted(world, waited_seconds=2.0) == []

    world.clock.advance(2.0)

    assert wanted(world, waited_seconds=2.0) == ["smol"]


def test_quantized_base_model_is_loaded_only_on_a_worker_that_supports_it(world: World) -> None:
    want(world)
    with world.db.write() as session:
        row = session.query(WantedBase).one()
        key = row.pack_key = pack_key(sha("smol"), "bfloat16", "int8")
        task_queue.add(session, TaskKind.LOAD, key, project_id=None, run_after=0.0)
    world.worker("w2", quantizations=("int8",))

    assert (wanted(world), wanted(world, "w2")) == ([], ["smol"])


def test_api_servers_can_want_the_same_base_model_at_once(world: World) -> None:
    answering, start = model(world), threading.Barrier(4)

    def begin() -> Any:
        start.wait()
        return engines.want(world.db, answering, since=world.clock.now, is_batch=False)

    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(begin) for _ in range(4)]] == [None] * 4

    assert wanted(world) == ["smol"]


def test_clients_are_told_if_no_worker_runs_and_batches_wait(world: World) -> None:
    world.clock.advance(RESTART_SECONDS - 1)
    assert want(world) is None

    world.clock.advance(2)

    with pytest.raises(NoWorker) as refused:
        want(world)
    assert (refused.value.status, refused.value.code) == (503, "inference_timeout")
    assert want(world, is_batch=True) is None


def test_error_of_a_load_reaches_the_requests_that_waited_meanwhile(world: World) -> None:
    before = world.clock.now
    want(world)
    outcomes.fail(world.db, reserved(world), engines.LOAD, ErrorText(**ERROR))

    assert wanted(world) == []
    assert want(world, since=before) == ERROR
    assert want(world) is None, "a later request lets a worker try again"
    assert wanted(world) == ["smol"]


@pytest.mark.parametrize("is_lost", [False, True])
def test_base_model_that_workers_fail_to_load_is_tried_a_limited_number_of_times(world: World, is_lost: bool) -> None:
    """is_lost: each worker dies as it loads the base model."""
    before = world.clock.now
    for _ in range(MAX_ATTEMPTS[TaskKind.LOAD]):
        assert want(world, since=before) is None
        assert wanted(world) == ["smol"]
        claimed = reserved(world)
        if not is_lost:
            outcomes.retry(world.db, claimed, engines.LOAD, LOAD_FAILED)
            assert wanted(world) == [], "the next attempt comes later"
        world.clock.advance(3600)
        world.worker()
    if is_lost:
        assert reserve(world) is None

    error = want(world, since=before)
    assert error is not None
    assert (error["code"], error["remedy"]) == (LOAD_FAILED.code, LOAD_FAILED.remedy)
    assert reserve(world) is None


def test_load_that_is_given_back_does_not_count(world: World) -> None:
    want(world)

    for _ in range(2 * MAX_ATTEMPTS[TaskKind.LOAD]):
        claimed = reserved(world)
        assert not claimed.is_exhausted
        task_queue.release(world.db, claimed)


def test_base_models_that_no_request_waits_for_are_forgotten(world: World) -> None:
    world.base("other")
    want(world)
    world.clock.advance(WANTED_SECONDS - 1)
    want(world, "other")
    world.clock.advance(2)

    engines.remove_lapsed(world.db)

    with world.db.read() as session:
        assert [row.base_model for row in session.query(WantedBase)] == ["other"]
    world.clock.advance(WANTED_SECONDS)
    engines.remove_lapsed(world.db)
    assert not notifier.has_work(world.db)


def test_base_model_is_not_forgotten_while_a_worker_loads_it(world: World) -> None:
    want(world)
    claimed = reserved(world)
    world.clock.advance(WANTED_SECONDS + 1)

    engines.remove_lapsed(world.db)

    outcomes.fail(world.db, claimed, engines.LOAD, ErrorText(**ERROR))
    engines.remove_lapsed(world.db)
    with pytest.raises(StaleClaim):
        engines.note_loaded(world.db, claimed)
    with world.db.read() as session:
        assert session.query(WantedBase).count() == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_base_model_that_is_wanted_again_while_it_is_forgotten_stays_wanted(world: World) -> None:
    want(world)
    world.clock.advance(WANTED_SECONDS + 1)
    answering, pool = model(world), ThreadPoolExecutor(1)
    again: list[Any] = []
    after_statement(
        world.db,
        "DELETE FROM tasks",
        lambda: again.append(pool.submit(engines.want, world.db, answering, since=world.clock.now, is_batch=False)),
    )

    engines.remove_lapsed(world.db)

    assert again[0].result(30) is None
    pool.shutdown()
    assert wanted(world) == ["smol"]


def test_loaded_trainer_of_a_live_worker_answers(world: World) -> None:
    assert found(world) == []
    workers.register_trainer(world.db, trainer_id="trainer-w1", worker_id="w1", base_digest=sha("smol"), pack_key=KEY)
    workers.worker_beat(world.db, "w1", resident_base=sha("smol"), trainer_id="trainer-w1", report={})
    assert found(world) == [], "it is not loaded"

    workers.report_trainer(world.db, "trainer-w1", report={}, address="w1:1", secret="secret of w1")

    assert found(world) == [LOADED]
    assert found(world, pack_key(sha("smol"), "float32")) == []
    assert "secret of w1" not in repr(engines.trainers_of(world.db, KEY))
    workers.end_trainer(world.db, "trainer-w1")
    assert found(world) == []


@pytest.mark.parametrize("change", ["cordon", "drain", "silence", "end", "restart"])
def test_trainer_of_a_worker_that_takes_nothing_new_gets_no_requests(world: World, change: str) -> None:
    world.load(KEY)
    assert found(world) == [LOADED]

    if change == "cordon":
        cordons.cordon(world.db, "w1", reason="a fan is loud")
    elif change == "drain":
        cordons.drain(world.db, "w1")
    elif change == "silence":
        world.clock.advance(3600)
    elif change == "end":
        workers.end_worker(world.db, "w1")
    else:
        world.worker()

    assert found(world) == []


def test_base_model_that_only_a_cordoned_worker_has_is_loaded_elsewhere(world: World) -> None:
    world.load(KEY)
    world.worker("w2")
    want(world)
    assert wanted(world, "w2") == []

    cordons.cordon(world.db, "w1", reason="a fan is loud")

    assert wanted(world, "w2") == ["smol"]


def test_timeout_explains_what_the_workers_do(world: World) -> None:
    def why() -> str:
        error = engines.why_unanswered(world.db, model(world))
        assert (error.status, error.code) == (503, "inference_timeout")
        return error.message

    want(world)
    assert "no worker has 'smol' loaded" in why()
    claimed = reserved(world)
    assert "still loading 'smol'" in why()
    engines.note_loaded(world.db, claimed)
    world.load(KEY)
    assert "workers that have 'smol' loaded are busy" in why()
    cordons.drain(world.db, "w1")
    assert "cordoned or draining" in why()
    world.clock.advance(3600)
    assert "no worker is running" in why()
