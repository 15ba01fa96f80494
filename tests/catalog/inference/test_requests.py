"""Inference requests: which model answers, who may claim one, and what happens if a worker or a client is lost."""

from __future__ import annotations

from typing import Any

import pytest
from catalog.inference.claims import InferenceClaim
from sqlalchemy import text

from catalog.caller import Caller
from catalog.errors import Conflict, NotFound, RateLimited
from catalog.fleet import cordons, workers
from catalog.inference import claims, requests
from catalog.inference.requests import MAX_SECONDS, NoWorker
from catalog.queue import pending
from catalog.registry import base_models
from catalog.resources.pack_key import pack_key
from catalog.tables.inference import MAX_CLAIMS, InferenceRequest
from catalog.usage import report
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import LEASE, World, sha

KEY = pack_key(sha("smol"), "bfloat16")


@pytest.fixture
def world(world: World) -> World:
    world.worker()
    return world


def submit(world: World, *, caller: Caller | None = None, model: str = "smol", **given: Any) -> InferenceRequest:
    caller = caller or world.caller
    found = requests.resolve(world.db, project_id=caller.project_id, name=model)
    fields = {"body": {"prompts": ["a"]}, "reply_to": "127.0.0.1:1", **given}
    return requests.submit(world.db, project_id=caller.project_id, model=found, **fields)


def claim(world: World, *, limit: int = 10, worker_id: str = "w1", key: str = KEY) -> list[InferenceClaim]:
    return claims.claim(world.db, worker_id=worker_id, pack_key=key, limit=limit, lease_seconds=LEASE)


def register_trainer(world: World, key: str) -> None:
    workers.register_trainer(world.db, trainer_id="trainer-1", worker_id="w1", base_digest=sha("smol"), pack_key=key)


def load(world: World) -> None:
    """Let worker w1 report that its trainer has loaded the base model."""
    workers.worker_beat(world.db, "w1", resident_base=sha("smol"), trainer_id="trainer-1", report={})


def test_base_model_answers_in_the_precision_of_the_workers(world: World) -> None:
    found = requests.resolve(world.db, project_id=world.caller.project_id, name="smol")

    assert (found.base_model, found.base_digest, found.adapter, found.pack_key) == ("smol", sha("smol"), None, KEY)


@pytest.mark.parametrize(("quantization", "is_used"), [("none", True), ("nf4", False)])
def test_base_model_that_is_loaded_without_quantization_answers_as_it_is_loaded(
    world: World, quantization: str, is_used: bool
) -> None:
    key = pack_key(sha("smol"), "float32", quantization)
    register_trainer(world, key)
    load(world)

    assert requests.resolve(world.db, project_id=world.caller.project_id, name="smol").pack_key == (
        key if is_used else KEY
    )


def test_adapter_answers_as_it_was_trained(world: World) -> None:
    job = world.running(precision="float32")
    world.complete(job.claim_id)
    name = world.job(job.job.id).adapter_name
    assert name is not None

    found = requests.resolve(world.db, project_id=world.caller.project_id, name=name)

    assert found.adapter is not None
    assert found.pack_key == pack_key(sha("smol"), "float32")
    with pytest.raises(NotFound):
        requests.resolve(world.db, project_id=world.stranger.project_id, name=name)
    base_models.delete(world.db, "smol")
    with pytest.raises(Conflict, match="deleted or replaced") as refused:
        requests.resolve(world.db, project_id=world.caller.project_id, name=name)
    assert refused.value.code == "base_changed"
    assert "`lorry models add smol SOURCE`" in refused.value.remedy


@pytest.mark.parametrize("has_failed", [False, True])
def test_base_model_that_is_not_ready_is_a_conflict(world: World, has_failed: bool) -> None:
    base_models.add(world.db, name="new", kind="folder", source="/models/new")
    if has_failed:
        world.fail_import("new", {"code": "x", "message": "y", "param": None})

    with pytest.raises(Conflict, match="import failed" if has_failed else "has not finished"):
        requests.resolve(world.db, project_id=world.caller.project_id, name="new")
    with pytest.raises(NotFound):
        requests.resolve(world.db, project_id=world.caller.project_id, name="unknown")


def test_without_a_live_worker_a_request_is_rejected(world: World) -> None:
    world.clock.advance(3600)

    with pytest.raises(NoWorker) as refused:
        submit(world)

    assert (refused.value.status, refused.value.code) == (503, "no_worker")


def test_number_of_open_requests_of_a_project_is_limited(world: World) -> None:
    submit(world, max_open=1)

    with pytest.raises(RateLimited, match="1 open"):
        submit(world, max_open=1)
    submit(world, caller=world.stranger, max_open=1)


def test_request_is_work_until_it_is_claimed(world: World) -> None:
    assert not pending.has_work(world.db)
    row = submit(world)
    assert pending.has_work(world.db)

    (claimed,) = claim(world)

    assert claimed.request_id == row.id
    assert claimed.body == {"prompts": ["a"]}
    assert claimed.reply_to == "127.0.0.1:1"
    assert not pending.has_work(world.db)
    assert claim(world) == []
    assert requests.is_held(world.db, row.id, claimed.claim_id)
    assert not requests.is_held(world.db, row.id, "answer-other")
    assert not requests.is_held(world.db, "infer-other", claimed.claim_id)


def test_requests_for_another_trainer_are_not_claimed(world: World) -> None:
    submit(world)

    assert claim(world, key=pack_key(sha("smol"), "float32")) == []
    assert len(claim(world)) == 1


def test_projects_take_turns(world: World) -> None:
    ours = [submit(world).id for _ in range(5)]
    theirs = [submit(world, caller=world.stranger).id for _ in range(2)]

    found = [claimed.request_id for claimed in claim(world, limit=5)]

    assert found == [ours[0], theirs[0], ours[1], theirs[1], ours[2]]


def test_requests_that_are_answered_count_for_their_project(world: World) -> None:
    for _ in range(4):
        submit(world)
    assert len(claim(world, limit=2)) == 2
    theirs = [submit(world, caller=world.stranger).id for _ in range(2)]

    found = [claimed.request_id for claimed in claim(world, limit=2)]

    assert found == theirs


def test_release_by_a_worker_that_shuts_down_does_not_count(world: World) -> None:
    submit(world)
    for _ in range(2 * MAX_CLAIMS):
        (claimed,) = claim(world)
        assert not claimed.is_last
        claims.release(world.db, [claimed.claim_id], counts=False)


def test_expired_lease_lets_another_worker_answer(world: World) -> None:
    submit(world)
    (first,) = claim(world)
    world.clock.advance(LEASE + 1)
    world.worker("w2")

    (second,) = claim(world, worker_id="w2")

    assert second.request_id == first.request_id
    assert claims.renew(world.db, [first.claim_id, second.claim_id], lease_seconds=LEASE) == {first.claim_id}
    assert not requests.is_held(world.db, first.request_id, first.claim_id)


def test_renewed_lease_does_not_expire(world: World) -> None:
    submit(world)
    (claimed,) = claim(world)
    for _ in range(3):
        world.clock.advance(LEASE - 1)
        assert claims.renew(world.db, [claimed.claim_id], lease_seconds=LEASE) == set()

    world.worker("w2")
    assert claim(world, worker_id="w2") == []
    assert claims.renew(world.db, [], lease_seconds=LEASE) == set()


@pytest.mark.parametrize("by_worker", [False, True])
def test_released_request_is_free_at_once(world: World, by_worker: bool) -> None:
    row = submit(world)
    (claimed,) = claim(world)

    if by_worker:
        claims.release(world.db, [claimed.claim_id])
    else:
        requests.release(world.db, "infer-other", claimed.claim_id)
        assert claim(world) == []
        requests.release(world.db, row.id, claimed.claim_id)

    assert len(claim(world)) == 1


def test_request_that_too_many_workers_could_not_answer_is_claimed_no_more_and_deleted(world: World) -> None:
    row = submit(world)

    for number in range(1, MAX_CLAIMS + 1):
        (claimed,) = claim(world)
        assert claimed.is_last == (number == MAX_CLAIMS)
        assert requests.remove_expired(world.db) == 0
        assert requests.release(world.db, row.id, claimed.claim_id) == (number < MAX_CLAIMS)

    assert claim(world) == []
    assert not pending.has_work(world.db)
    assert claims.unloaded(world.db, worker_id="w1") == []
    assert requests.remove_expired(world.db) == 1


def make_unreadable(world: World, row: InferenceRequest) -> None:
    """Nest the request's body too deeply for Python's parser."""
    body = '{"messages": ' + "[" * 5000 + "]" * 5000 + "}"
    with world.db.write() as session:
        session.execute(text("update inference_requests set body = :body where id = :id"), {"body": body, "id": row.id})


def test_request_that_can_not_be_read_affects_no_other_and_is_claimed_a_limited_number_of_times(world: World) -> None:
    unreadable, other = submit(world), submit(world)
    make_unreadable(world, unreadable)

    found = {claimed.request_id: claimed for claimed in claim(world)}

    assert found[other.id].body == {"prompts": ["a"]}
    assert (found[unreadable.id].body, found[unreadable.id].num_answers) == (None, 1)
    for _ in range(MAX_CLAIMS - 1):
        world.clock.advance(LEASE + 1)
        world.worker()
        assert unreadable.id in {claimed.request_id for claimed in claim(world)}
    world.clock.advance(LEASE + 1)
    world.worker()
    assert unreadable.id not in {claimed.request_id for claimed in claim(world)}
    assert not pending.has_work(world.db)
    requests.finish(world.db, unreadable.id, prompt_tokens=0, completion_tokens=0)
    assert requests.existing(world.db, [unreadable.id]) == set()


def test_request_that_can_not_be_read_is_reserved(world: World) -> None:
    make_unreadable(world, submit(world))

    claimed = claims.reserve(world.db, worker_id="w1", pack_key=KEY, lease_seconds=LEASE)

    assert claimed is not None
    assert claimed.body is None


def test_answered_request_is_deleted_and_counted(world: World) -> None:
    row = submit(world)
    (claimed,) = claim(world)

    requests.finish(world.db, row.id, prompt_tokens=7, completion_tokens=3)
    requests.finish(world.db, row.id, prompt_tokens=7, completion_tokens=3)

    assert claims.renew(world.db, [claimed.claim_id], lease_seconds=LEASE) == {claimed.claim_id}
    query = report.UsageQuery(start_time=world.clock.now - 86400, group_by=("project_id", "model"))
    (used,) = [used for day in report.report(world.db, caller=world.caller, query=query).days for used in day.used]
    assert used.model == "smol"
    names = ("num_completions", "prompt_tokens", "completion_tokens")
    assert [used.amounts[name] for name in names] == [1, 7, 3]


def test_request_that_no_worker_began_is_not_counted(world: World) -> None:
    row = submit(world)

    requests.finish(world.db, row.id, prompt_tokens=0, completion_tokens=0)

    query = report.UsageQuery(start_time=world.clock.now - 86400)
    assert [used for day in report.report(world.db, caller=world.caller, query=query).days for used in day.used] == []


def test_requests_are_claimed_until_they_ask_for_enough_answers(world: World) -> None:
    large = [submit(world, body={"prompts": ["a", "b"], "n": 3}) for _ in range(3)]
    chat = submit(world, body={"messages": [], "n": 2})

    found = [claim(world, limit=7), claim(world, limit=7)]

    assert [[each.request_id for each in some] for some in found] == [
        [large[0].id, large[1].id],
        [large[2].id, chat.id],
    ]
    assert [each.num_answers for each in found[1]] == [6, 2]


def test_old_request_is_neither_claimed_nor_kept(world: World) -> None:
    row = submit(world)
    world.clock.advance(MAX_SECONDS + 1)
    world.worker("w2")

    assert claim(world, worker_id="w2") == []
    assert claims.unloaded(world.db, worker_id="w2") == []
    assert not pending.has_work(world.db)
    error = requests.why_unanswered(world.db, row.id)
    assert (error.code, error.status) == ("inference_timeout", 503)
    assert "no worker has 'smol' loaded" in error.message
    assert requests.remove_expired(world.db) == 1
    assert requests.remove_expired(world.db) == 0
    assert "its base model" in requests.why_unanswered(world.db, row.id).message


def test_timeout_explains_what_the_workers_do(world: World) -> None:
    row = submit(world)

    def why() -> str:
        return requests.why_unanswered(world.db, row.id).message

    assert "none was free to load it" in why()
    register_trainer(world, KEY)
    load(world)
    assert "workers that have 'smol' loaded are busy" in why()
    (claimed,) = claim(world)
    assert "its worker is busy" in why()
    claims.release(world.db, [claimed.claim_id])
    cordons.drain(world.db, "w1")
    assert "cordoned or draining" in why()
    world.clock.advance(3600)
    assert "no worker is running" in why()


def test_timeout_names_a_base_model_that_is_being_loaded(world: World) -> None:
    row = submit(world)
    claim(world)

    assert "still loading 'smol'" in requests.why_unanswered(world.db, row.id).message


@pytest.mark.parametrize("by", ["worker", "api"])
def test_released_request_waits_anew_for_another_worker(world: World, by: str) -> None:
    """Its client still reads the answer, which the first worker may have sent for longer than MAX_SECONDS."""
    row = submit(world)
    (first,) = claim(world)
    for _ in range(3):
        world.clock.advance(MAX_SECONDS / 2)
        assert claims.renew(world.db, [first.claim_id], lease_seconds=MAX_SECONDS) == set()

    if by == "worker":
        claims.release(world.db, [first.claim_id])
    else:
        requests.release(world.db, row.id, first.claim_id)

    assert requests.remove_expired(world.db) == 0
    world.clock.advance(MAX_SECONDS - 1)
    world.worker("w2")
    assert [other.request_id for other in claim(world, worker_id="w2")] == [row.id]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_request_that_is_released_while_expired_ones_are_deleted_is_kept(world: World) -> None:
    row = submit(world)
    (claimed,) = claim(world)
    world.clock.advance(MAX_SECONDS + LEASE)
    after_statement(
        world.db,
        "SELECT inference_requests.id",
        lambda: requests.release(world.db, row.id, claimed.claim_id),
    )

    assert requests.remove_expired(world.db) == 0

    assert requests.existing(world.db, [row.id]) == {row.id}
    world.clock.advance(MAX_SECONDS)
    assert requests.remove_expired(world.db) == 1


def test_base_model_is_loaded_for_the_oldest_request_that_no_trainer_can_answer(world: World) -> None:
    world.base("other")
    assert claims.unloaded(world.db, worker_id="w1") == []
    submit(world, model="other")
    submit(world)

    wanted, after = claims.unloaded(world.db, worker_id="w1")

    assert (wanted.base_model, wanted.base_digest) == ("other", sha("other"))
    assert after.base_model == "smol"
    claim(world, key=wanted.pack_key)  # this worker loads it now
    assert claims.unloaded(world.db, worker_id="w1") == [after]


def test_quantized_base_model_is_loaded_only_on_a_worker_that_supports_it(world: World) -> None:
    row = submit(world)
    key = pack_key(sha("smol"), "bfloat16", "nf4")
    with world.db.write() as session:
        session.get_one(InferenceRequest, row.id).pack_key = key
    world.worker("w2", quantizations=("nf4",))

    assert claims.unloaded(world.db, worker_id="w1") == []
    assert [wanted.pack_key for wanted in claims.unloaded(world.db, worker_id="w2")] == [key]


def test_no_base_model_is_loaded_twice_or_on_a_cordoned_worker(world: World) -> None:
    submit(world)
    register_trainer(world, KEY)
    world.worker("w2")
    assert len(claims.unloaded(world.db, worker_id="w2")) == 1

    load(world)

    assert claims.unloaded(world.db, worker_id="w2") == []
    workers.end_trainer(world.db, "trainer-1")
    assert len(claims.unloaded(world.db, worker_id="w2")) == 1, "w1 has not reported it yet"


def test_requests_that_have_not_waited_long_do_not_count(world: World) -> None:
    submit(world)
    assert claims.unloaded(world.db, worker_id="w1", waited_seconds=2.0) == []

    world.clock.advance(2.0)

    assert len(claims.unloaded(world.db, worker_id="w1", waited_seconds=2.0)) == 1


def test_requests_of_batches_count_only_if_asked(world: World) -> None:
    world.move_to_batch(submit(world))

    assert claims.unloaded(world.db, worker_id="w1", with_batches=False) == []
    assert len(claims.unloaded(world.db, worker_id="w1")) == 1


def test_one_worker_reserves_a_base_model_however_many_requests_wait(world: World) -> None:
    world.worker("w2")
    first, second = submit(world), submit(world)

    def reserve(worker_id: str) -> InferenceClaim | None:
        return claims.reserve(world.db, worker_id=worker_id, pack_key=KEY, lease_seconds=LEASE)

    reserved = reserve("w1")
    assert reserved is not None
    assert reserved.request_id == first.id
    assert reserve("w2") is None
    assert claims.unloaded(world.db, worker_id="w2") == []

    claims.release(world.db, [reserved.claim_id], counts=False)
    again = reserve("w2")
    assert again is not None
    assert again.request_id == first.id
    world.clock.advance(LEASE + 1)
    last = reserve("w1")
    assert last is not None, "the lease of w2 has expired"
    assert last.request_id in {first.id, second.id}


def test_cordoned_worker_reserves_nothing(world: World) -> None:
    submit(world)
    cordons.cordon(world.db, "w1", reason="a fan is loud")

    assert claims.reserve(world.db, worker_id="w1", pack_key=KEY, lease_seconds=LEASE) is None
