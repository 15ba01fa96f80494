"""A batch belongs to one process at a time. Its results are stored and counted once, and a late process writes
nothing."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.batches import commands, execution
from catalog.batches.execution import BATCH_LEASE_SECONDS, BatchClaim
from catalog.db.database import Database
from catalog.errors import Conflict, InvalidRequest, QuotaExceeded, StaleClaim
from catalog.inference import claims, requests
from catalog.maintenance import garbage_collection
from catalog.resources.pack_key import pack_key
from catalog.storage import files
from catalog.storage.store import Blob
from catalog.tables.batches import Batch, BatchLine
from catalog.tables.inference import InferenceRequest
from catalog.tables.storage import File
from catalog.tables.tenancy import Project
from catalog.usage import ledger
from tests.catalog.world import LEASE, World, sha

pytestmark = pytest.mark.both_databases
KEY = pack_key(sha("smol"), "bfloat16")


@pytest.fixture
def world(world: World) -> World:
    world.worker()
    return world


def create(world: World, **given: Any) -> Batch:
    given = {"input_file": world.file(purpose="batch", num_rows=None), **given}
    return commands.create(world.db, caller=world.caller, endpoint="/v1/completions", **given)


def claim(world: World) -> BatchClaim:
    found = execution.claim(world.db)
    assert found is not None
    return found


def begun(world: World, *, num_lines: int = 3) -> BatchClaim:
    create(world)
    claimed = claim(world)
    execution.begin(world.db, claimed, num_lines=num_lines)
    return claimed


def submit(world: World, claimed: BatchClaim, request_id: str = "infer-1") -> bool:
    model = requests.resolve(world.db, project_id=world.caller.project_id, name="smol")
    return execution.submit(
        world.db, claimed, request_id=request_id, model=model, body={"prompts": ["a"]}, reply_to="127.0.0.1:1"
    )


def store(world: World, claimed: BatchClaim, number: int, *, is_failed: bool = False, **given: Any) -> None:
    counts = {"request_id": "infer-1", "prompt_tokens": 5, "completion_tokens": 2, **given}
    execution.store_result(world.db, claimed, number=number, result={"n": number}, is_failed=is_failed, **counts)


def row(world: World, claimed: BatchClaim) -> Batch:
    return commands.get(world.db, project_id=claimed.project_id, batch_id=claimed.batch_id)


def num_rows(db: Database, table: type[Any]) -> int:
    with db.read() as session:
        return session.query(table).count()


def used(world: World) -> tuple[float, float]:
    with world.db.read() as session:
        today = ledger.day_of(world.clock.now)
        project_id = world.caller.project_id
        names = ("prompt_tokens", "completion_tokens")
        read, written = (ledger.total(session, project_id, name, first_day=today) for name in names)
        return read, written


def test_claimed_batch_is_not_claimed_again_until_its_lease_expires(world: World) -> None:
    create(world)
    first = claim(world)
    assert execution.claim(world.db) is None
    assert not execution.is_any_waiting(world.db)
    world.clock.advance(BATCH_LEASE_SECONDS - 1)
    execution.renew(world.db, first)
    world.clock.advance(BATCH_LEASE_SECONDS - 1)
    assert execution.claim(world.db) is None

    world.clock.advance(2)
    second = claim(world)

    assert (second.batch_id, second.project_id) == (first.batch_id, world.caller.project_id)
    with pytest.raises(StaleClaim):
        execution.renew(world.db, first)


def test_batch_that_waited_longest_is_next(world: World) -> None:
    ids = [create(world).id for _ in range(3)]
    first = claim(world)
    execution.release(world.db, first)

    order = [claim(world).batch_id for _ in range(3)]

    assert first.batch_id == ids[0]
    assert order == [ids[1], ids[2], ids[0]]


def test_projects_take_turns_however_many_batches_they_have(world: World) -> None:
    many = [create(world).id for _ in range(4)]
    one = create_of_another_project(world)

    first, second = claim(world), claim(world)
    execution.release(world.db, second)
    turns = [first.batch_id, second.batch_id]
    for _ in range(4):  # a process that works on one batch at a time
        claimed = claim(world)
        turns.append(claimed.batch_id)
        execution.release(world.db, claimed)

    assert turns == [many[0], one, many[1], one, many[2], one]


def test_turn_of_a_finished_batch_counts(world: World) -> None:
    """Otherwise a project with many small batches, each finished in one turn, would never have had a turn."""
    many = [create(world).id for _ in range(3)]
    one = create_of_another_project(world)

    order: list[str] = []
    for _ in range(4):
        claimed = claim(world)
        order.append(claimed.batch_id)
        execution.fail(world.db, claimed, [])

    assert order == [many[0], one, many[1], many[2]]


def create_of_another_project(world: World) -> str:
    """Create a batch in a second project, after the others. Returns its id."""
    caller = world.stranger
    file = world.file(caller=caller, purpose="batch", num_rows=None)
    return commands.create(world.db, caller=caller, endpoint="/v1/completions", input_file=file).id


def test_late_process_writes_nothing_and_its_requests_are_deleted(world: World) -> None:
    late = begun(world)
    assert submit(world, late)
    world.clock.advance(BATCH_LEASE_SECONDS + 1)
    claim(world)

    assert num_rows(world.db, InferenceRequest) == 0
    for write in (
        lambda: store(world, late, 1),
        lambda: submit(world, late),
        lambda: execution.begin(world.db, late, num_lines=1),
        lambda: execution.fail(world.db, late, []),
        lambda: execution.finalize(world.db, late),
        lambda: execution.end(world.db, late, "completed", output=None, failures=None),
        lambda: execution.release(world.db, late),
    ):
        with pytest.raises(StaleClaim):
            write()
    assert not execution.is_any_waiting(world.db)
    assert used(world) == (0, 0)


def test_result_is_stored_and_counted_once(world: World) -> None:
    claimed = begun(world)
    submit(world, claimed)

    store(world, claimed, 1)
    store(world, claimed, 1)  # the reply of the first call was lost
    submit(world, claimed)
    store(world, claimed, 3, is_failed=True)

    batch = row(world, claimed)
    assert (batch.num_completed, batch.num_failed, batch.prompt_tokens, batch.completion_tokens) == (1, 1, 10, 4)
    assert used(world) == (10, 4)
    assert num_rows(world.db, InferenceRequest) == 0
    assert execution.finished_lines(world.db, claimed.batch_id) == {1, 3}
    assert [line.number for line in execution.results(world.db, claimed.batch_id, after=1, limit=5)] == [3]


def test_cancelled_or_expired_batch_submits_nothing(world: World) -> None:
    claimed = begun(world)
    world.clock.advance(commands.WINDOW_SECONDS + 1)
    assert not submit(world, claimed)
    assert execution.renew(world.db, claimed).is_expired

    commands.cancel(world.db, project_id=claimed.project_id, batch_id=claimed.batch_id)
    assert execution.renew(world.db, claimed).status == "cancelling"
    execution.finalize(world.db, claimed)
    assert row(world, claimed).status == "cancelling"


def test_ended_batch_keeps_its_files_and_loses_its_results(world: World) -> None:
    claimed = begun(world, num_lines=1)
    store(world, claimed, 1)
    execution.finalize(world.db, claimed)
    with pytest.raises(Conflict) as refused:
        commands.cancel(world.db, project_id=claimed.project_id, batch_id=claimed.batch_id)
    assert refused.value.code == "batch_finished"
    garbage_collection.drop_references(world.db)
    assert num_rows(world.db, BatchLine) == 1

    execution.end(world.db, claimed, "completed", output=Blob(digest=sha("out"), num_bytes=7), failures=None)

    batch = row(world, claimed)
    assert (batch.status, batch.error_file) == ("completed", None)
    assert batch.output_file is not None
    output = files.get(world.db, project_id=claimed.project_id, file_id=batch.output_file)
    assert (output.purpose, output.num_bytes, output.expires_at) == ("batch_output", 7, None)
    assert sha("out") in garbage_collection.live_digests(world.db)
    assert execution.claim(world.db) is None
    garbage_collection.drop_references(world.db)
    assert num_rows(world.db, BatchLine) == 0


def test_failed_batch_lists_its_errors(world: World) -> None:
    create(world)
    claimed = claim(world)
    error = {"code": "invalid_json", "message": "m", "param": None, "line": 2}

    execution.fail(world.db, claimed, [error], num_lines=3)

    batch = row(world, claimed)
    assert (batch.status, batch.errors, batch.num_lines) == ("failed", [error], 3)
    assert execution.claim(world.db) is None


def test_input_file_stays_until_the_batch_has_ended(world: World) -> None:
    batch = create(world)
    with world.db.write() as session:
        session.get_one(File, batch.input_file).expires_at = 1.0
    with pytest.raises(Conflict, match=batch.id):
        files.delete(world.db, project_id=batch.project_id, file_id=batch.input_file)
    garbage_collection.drop_references(world.db)
    digest = files.get(world.db, project_id=batch.project_id, file_id=batch.input_file).digest
    assert digest in garbage_collection.live_digests(world.db)

    with pytest.raises(InvalidRequest, match="expired"):
        create(world, input_file=batch.input_file)
    execution.fail(world.db, claim(world), [])
    garbage_collection.drop_references(world.db)

    assert digest not in garbage_collection.live_digests(world.db)


def interactive(world: World) -> str:
    model = requests.resolve(world.db, project_id=world.caller.project_id, name="smol")
    return requests.submit(
        world.db,
        project_id=world.caller.project_id,
        model=model,
        body={"prompts": ["a"]},
        reply_to="127.0.0.1:1",
        max_open=2,
    ).id


def test_requests_of_clients_are_claimed_before_those_of_batches(world: World) -> None:
    claimed = begun(world)
    of_batch = [f"infer-{number}" for number in range(4)]
    for request_id in of_batch:
        assert submit(world, claimed, request_id)
    of_client = [interactive(world), interactive(world)]  # two, although four others are open

    def take(limit: int, batch_limit: int) -> list[tuple[str, bool]]:
        found = claims.claim(
            world.db, worker_id="w1", pack_key=KEY, limit=limit, batch_limit=batch_limit, lease_seconds=LEASE
        )
        return [(each.request_id, each.is_batch) for each in found]

    assert take(1, 1) == [(of_client[0], False)]
    assert take(5, 1) == [(of_client[1], False), (of_batch[0], True)]
    assert take(5, 0) == []
    assert take(5, 2) == [(of_batch[1], True), (of_batch[2], True)]


def test_base_models_of_clients_are_loaded_before_those_of_batches(world: World) -> None:
    claimed = begun(world)
    submit(world, claimed)
    world.base("other")
    model = requests.resolve(world.db, project_id=world.caller.project_id, name="other")
    requests.submit(world.db, project_id=world.caller.project_id, model=model, body={}, reply_to="127.0.0.1:1")

    assert [wanted.base_model for wanted in claims.unloaded(world.db, worker_id="w1")] == ["other", "smol"]


def test_tokens_per_day_are_limited(world: World) -> None:
    claimed = begun(world)
    with world.db.write() as session:
        session.get_one(Project, world.caller.project_id).max_tokens_per_day = 7
    assert submit(world, claimed)
    store(world, claimed, 1)

    with pytest.raises(QuotaExceeded, match="7 inference tokens per day") as refused:
        interactive(world)
    with pytest.raises(QuotaExceeded):
        submit(world, claimed)

    assert refused.value.quota | {"resets_at": 0} == {"name": "tokens_per_day", "limit": 7, "used": 7, "resets_at": 0}
    world.clock.advance(refused.value.retry_after_seconds)
    world.worker("w2")
    assert interactive(world)
