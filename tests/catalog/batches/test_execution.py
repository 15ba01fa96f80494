"""A batch belongs to one process at a time. Its results are stored and counted once, and a late process writes
nothing."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.batches import commands, execution
from catalog.batches.execution import BATCH_LEASE_SECONDS, BatchClaim
from catalog.db.database import Database
from catalog.errors import Conflict, InvalidRequest, QuotaExceeded, StaleClaim
from catalog.inference import requests
from catalog.maintenance import garbage_collection
from catalog.storage import files
from catalog.storage.store import Blob
from catalog.tables.serving import Batch, BatchLine
from catalog.tables.storage import File
from catalog.tables.tenancy import Project
from catalog.usage import ledger
from catalog.usage.ledger import Amount
from tests.catalog.world import World, sha

pytestmark = pytest.mark.both_databases


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


def store(world: World, claimed: BatchClaim, number: int, *, is_failed: bool = False, **given: Any) -> None:
    counts = {"base_model": "smol", "request_id": "infer-1", "prompt_tokens": 5, "completion_tokens": 2, **given}
    execution.store_result(world.db, claimed, number=number, result={"n": number}, is_failed=is_failed, **counts)


def count_interrupted(world: World, claimed: BatchClaim) -> None:
    counts = {"prompt_tokens": 5, "completion_tokens": 1}
    execution.count_interrupted(world.db, claimed, base_model="smol", request_id="infer-2", **counts)


def row(world: World, claimed: BatchClaim) -> Batch:
    return commands.get(world.db, project_id=claimed.project_id, batch_id=claimed.batch_id)


def num_rows(db: Database, table: type[Any]) -> int:
    with db.read() as session:
        return session.query(table).count()


def used(world: World) -> tuple[float, float]:
    """Return the tokens of prompts and of answers."""
    return total(world, "prompt_tokens"), total(world, "completion_tokens")


def num_completions(world: World) -> float:
    return total(world, "num_completions")


def total(world: World, name: Amount) -> float:
    with world.db.read() as session:
        return ledger.total(session, world.caller.project_id, name, first_day=ledger.day_of(world.clock.now))


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


def test_late_process_writes_nothing(world: World) -> None:
    late = begun(world)
    world.clock.advance(BATCH_LEASE_SECONDS + 1)
    claim(world)

    for write in (
        lambda: store(world, late, 1),
        lambda: count_interrupted(world, late),
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

    store(world, claimed, 1)
    store(world, claimed, 1)  # the reply of the first call was lost
    store(world, claimed, 3, is_failed=True)

    batch = row(world, claimed)
    assert (batch.num_completed, batch.num_failed, batch.prompt_tokens, batch.completion_tokens) == (1, 1, 10, 4)
    assert used(world) == (10, 4)
    assert execution.finished_lines(world.db, claimed.batch_id) == {1, 3}
    assert [line.number for line in execution.results(world.db, claimed.batch_id, after=1, limit=5)] == [3]


def test_line_that_no_engine_began_to_answer_is_not_counted(world: World) -> None:
    claimed = begun(world)

    store(world, claimed, 1, is_failed=True, base_model=None)
    store(world, claimed, 2, is_failed=True, prompt_tokens=0, completion_tokens=0)

    assert row(world, claimed).num_failed == 2
    assert used(world) == (0, 0)
    assert num_completions(world) == 0


def test_partial_answer_is_counted_without_a_result(world: World) -> None:
    claimed = begun(world)

    count_interrupted(world, claimed)

    batch = row(world, claimed)
    assert (batch.num_completed, batch.num_failed, batch.prompt_tokens, batch.completion_tokens) == (0, 0, 5, 1)
    assert (*used(world), num_completions(world)) == (5, 1, 1)


def test_process_learns_that_its_batch_is_expired_or_cancelled(world: World) -> None:
    claimed = begun(world)
    world.clock.advance(commands.WINDOW_SECONDS + 1)
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
    assert refused.value.code == "invalid_transition"
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


def test_tokens_per_day_are_limited(world: World) -> None:
    claimed = begun(world)
    project_id = world.caller.project_id
    with world.db.write() as session:
        session.get_one(Project, project_id).max_tokens_per_day = 7
    requests.check_quota(world.db, project_id=project_id)
    store(world, claimed, 1)

    with pytest.raises(QuotaExceeded, match="7 inference tokens per day") as refused:
        requests.check_quota(world.db, project_id=project_id)

    assert refused.value.quota | {"resets_at": 0} == {"name": "tokens_per_day", "limit": 7, "used": 7, "resets_at": 0}
    requests.check_quota(world.db, project_id=world.stranger.project_id)
    world.clock.advance(refused.value.retry_after_seconds)
    requests.check_quota(world.db, project_id=project_id)
