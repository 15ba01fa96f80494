"""Revoking a key: the report of unfinished work, cancellation, and revocation of descendants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from catalog import revocation
from catalog.audit import log
from catalog.batches import commands as batch_commands
from catalog.caller import Caller
from catalog.errors import Conflict, Forbidden, Unauthorized
from catalog.exports import commands as export_commands
from catalog.exports import formats as export_formats
from catalog.jobs import commands
from catalog.revocation import Revocation, UnfinishedWork
from catalog.states import JobState
from catalog.sweeps import creation
from catalog.tables.jobs import Sweep
from catalog.tables.serving import Batch
from catalog.tables.storage import AdapterExport
from catalog.tables.tenancy import ApiKey, AuditEvent
from catalog.tenancy import api_keys, authentication, projects
from catalog.tenancy.api_keys import KeyRequest
from tests.catalog.sweeping import advance, sweep_of
from tests.catalog.world import PEPPER, World, opens

HOUR = 3600.0
NOTHING = UnfinishedWork()


def child_of(world: World, caller: Caller, **given: Any) -> tuple[Caller, str]:
    """Create a key as this caller. Returns the caller of the new key and its secret."""
    _, secret = api_keys.create(world.db, caller=caller, request=KeyRequest(name="child", **given), pepper=PEPPER)
    return authentication.authenticate(world.db, secret=secret, pepper=PEPPER), secret


def revoke(world: World, key: Caller, *, by: Caller | None = None, **given: Any) -> Revocation:
    return revocation.revoke(world.db, caller=by or world.caller, api_key_id=key.api_key_id, **given)


def states(world: World, caller: Caller) -> set[tuple[str, bool]]:
    """Return the state and the cancellation request of each job that the key created."""
    found = commands.list_page(world.db, project_id=caller.project_id, limit=100).items
    return {(job.state, job.cancel_requested) for job in found if job.created_by == caller.api_key_id}


def revocations(world: World) -> dict[str | None, dict[str, Any]]:
    """Return the details of the revocation events by key."""
    operator = replace(world.caller, is_operator=True)
    wanted = log.Filters(types=["api_key.revoked"])
    found: list[AuditEvent] = log.list_page(world.db, caller=operator, filters=wanted, limit=100).items
    return {event.object_id: event.details for event in found}


def test_revocation_reports_and_records_unfinished_work(world: World) -> None:
    key, _ = child_of(world, world.caller)
    child_of(world, key)
    world.submit(caller=key)
    finished = world.submit(caller=key)
    commands.cancel(world.db, project_id=key.project_id, job_id=finished.id)
    sweep_of(world, key, max_concurrent=2)
    world.submit()

    found = revoke(world, key)

    assert (found.left, found.num_valid_descendants) == (UnfinishedWork(num_jobs=3, num_sweeps=1), 1)
    assert found.revoked == [key.api_key_id]
    assert revocations(world) == {key.api_key_id: {**found.left.counts(), "valid_descendants": 1, "cancel": False}}
    assert states(world, key) == {(JobState.VALIDATING_FILES, False), (JobState.CANCELLED, False)}


def test_cancel_ends_only_jobs_and_sweeps_of_the_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "JOBS_AT_ONCE", 2)
    key, _ = child_of(world, world.caller)
    world.worker()
    running, other = world.submit(caller=key), world.submit()
    world.prepare_all()
    world.claim()
    sweep_id = sweep_of(world, key)
    others = sweep_of(world, world.caller, max_concurrent=1)

    found = revoke(world, key, cancel=True)
    advance(world)

    assert found.left == NOTHING
    assert revocations(world)[key.api_key_id]["cancel"] is True
    assert states(world, key) == {(JobState.CANCELLED, False), (JobState.RUNNING, True)}
    assert world.job(running.id).cancel_requested
    assert not world.job(other.id).cancel_requested
    with world.db.read() as session:
        assert session.get_one(Sweep, sweep_id).cancel_requested
        assert session.get_one(Sweep, sweep_id).num_created == creation.AT_ONCE
        assert not session.get_one(Sweep, others).cancel_requested


def test_cancel_ends_batches_and_exports_of_the_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("BATCHES_AT_ONCE", "EXPORTS_AT_ONCE"):
        monkeypatch.setattr(revocation, limit, 1)
    world.base("llama", architecture="LlamaForCausalLM")
    adapter = world.complete(world.running(model="llama").claim_id)
    key, _ = child_of(world, world.caller)
    own_exports = [export(world, key, adapter.name, name) for name in ("merged", "gguf-lora")]
    other_export = export(world, world.caller, adapter.name, "gguf")
    own_batches, other_batch = [batch(world, key) for _ in range(2)], batch(world, world.caller)

    first, second = revoke(world, key), revoke(world, key, cancel=True)

    assert (first.left, second.left) == (UnfinishedWork(num_batches=2, num_exports=2), NOTHING)
    with world.db.read() as session:
        exports = {row.id: row.status for row in session.query(AdapterExport)}
        batches = {row.id: row.status for row in session.query(Batch)}
    assert exports == {**dict.fromkeys(own_exports, "cancelled"), other_export: "queued"}
    assert batches == {**dict.fromkeys(own_batches, "cancelling"), other_batch: "validating"}


def export(world: World, caller: Caller, adapter: str, name: export_formats.Format) -> str:
    return export_commands.create(world.db, caller=caller, adapter=adapter, format=name).id


def batch(world: World, caller: Caller) -> str:
    content = world.file(purpose="batch", num_rows=None)
    return batch_commands.create(world.db, caller=caller, input_file=content, endpoint="/v1/completions").id


def test_interrupted_revocation_can_be_repeated(world: World) -> None:
    key, _ = child_of(world, world.caller)
    child, secret = child_of(world, key)
    world.submit(caller=key)
    world.submit(caller=child)
    first = revoke(world, key)

    again = revoke(world, key, cancel=True, with_descendants=True)

    assert again.key.revoked_at == first.key.revoked_at
    assert again.revoked == [key.api_key_id, child.api_key_id]
    assert (again.left, again.num_valid_descendants) == (NOTHING, 0)
    assert not opens(world, secret)


def test_descendants_are_revoked_with_the_key(world: World) -> None:
    key, _ = child_of(world, world.caller)
    child, _ = child_of(world, key)
    grandchild, secret = child_of(world, child)
    given: dict[str, Any] = {"overlap_seconds": HOUR, "pepper": PEPPER}
    rotated, rotated_secret = api_keys.rotate(world.db, caller=grandchild, api_key_id=grandchild.api_key_id, **given)
    sibling, sibling_secret = child_of(world, world.caller)
    world.submit(caller=grandchild)

    found = revoke(world, key, with_descendants=True)

    expected = [key.api_key_id, child.api_key_id, grandchild.api_key_id, rotated.id]
    assert list(found.revoked) == expected
    assert found.left == UnfinishedWork(num_jobs=1, num_sweeps=0)
    assert revocations(world).keys() == set(expected)
    assert revocations(world)[key.api_key_id]["valid_descendants"] == 0
    assert [opens(world, each) for each in (secret, rotated_secret, sibling_secret)] == [False, False, True]
    assert sibling.api_key_id not in found.revoked


def test_descendants_stay_valid_by_default(world: World) -> None:
    key, _ = child_of(world, world.caller)
    _, secret = child_of(world, key)

    assert revoke(world, key).num_valid_descendants == 1

    assert opens(world, secret)


def test_key_cannot_revoke_itself_as_a_descendant(world: World) -> None:
    key, secret = child_of(world, world.caller)
    child, _ = child_of(world, key)

    with pytest.raises(Conflict) as refusal:
        revoke(world, key, by=child, with_descendants=True)

    assert refusal.value.code == "last_operator_key"
    assert opens(world, secret)
    assert revoke(world, child, by=child, with_descendants=True).revoked == [child.api_key_id]


def test_last_operator_key_is_not_revoked_as_a_descendant(world: World) -> None:
    office = projects.ensure(world.db, "office")
    _, secret = authentication.create(world.db, project_id=office.id, name="o", pepper=PEPPER, is_operator=True)
    operator = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    given: dict[str, Any] = {"is_operator": True}
    first, _ = child_of(world, operator, expires_at=world.clock.now + HOUR, **given)
    revoke(world, first, by=operator)
    second, _ = child_of(world, operator, **given)
    third, _ = child_of(world, second, **given)
    revoke(world, operator, by=third)

    with pytest.raises(Conflict) as refusal:
        revoke(world, second, by=second, with_descendants=True)

    assert refusal.value.code == "last_operator_key"
    assert revoke(world, second, by=third).key.revoked_at is not None


def test_cancel_requires_the_scope_to_cancel_jobs(world: World) -> None:
    key, secret = child_of(world, world.caller, scopes=["jobs:read"])
    by, _ = child_of(world, world.caller, scopes=["keys:write", "jobs:read"])

    with pytest.raises(Forbidden) as refusal:
        revoke(world, key, by=by, cancel=True)

    assert (refusal.value.code, refusal.value.param) == ("missing_scope", "cancel")
    assert refusal.value.remedy.endswith("use an API key that also has the scope jobs:write.")
    assert refusal.value.message.startswith(f"API key '{by.name}' can't cancel jobs")
    assert opens(world, secret)


@pytest.mark.parametrize("what", ["a job", "a sweep", "a key", "a rotation"])
def test_key_revoked_during_a_request_creates_nothing(world: World, what: str) -> None:
    key, _ = child_of(world, world.caller)
    child, _ = child_of(world, key)
    requests: dict[str, Callable[[], object]] = {
        "a job": lambda: world.submit(caller=key),
        "a sweep": lambda: sweep_of(world, key),
        "a key": lambda: child_of(world, key),
        "a rotation": lambda: api_keys.rotate(
            world.db, caller=key, api_key_id=child.api_key_id, overlap_seconds=HOUR, pepper=PEPPER
        ),
    }
    revoke(world, key)

    with pytest.raises(Unauthorized) as refusal:
        requests[what]()

    assert refusal.value.code == "invalid_api_key"
    assert commands.list_page(world.db, project_id=key.project_id).items == []


def test_key_revoked_during_a_request_creates_no_export(world: World) -> None:
    world.base("llama", architecture="LlamaForCausalLM")
    adapter = world.complete(world.running(model="llama").claim_id)
    key, _ = child_of(world, world.caller)
    revoke(world, key, cancel=True)

    with pytest.raises(Unauthorized):
        export(world, key, adapter.name, "merged")

    with world.db.read() as session:
        assert session.query(AdapterExport).all() == []


def test_key_revoked_during_a_request_revokes_no_other_key(world: World) -> None:
    key, _ = child_of(world, world.caller)
    child, secret = child_of(world, key)
    revoke(world, key)

    with pytest.raises(Unauthorized):
        revoke(world, child, by=key)

    assert opens(world, secret)


def test_key_revoked_during_a_request_changes_no_limit(world: World) -> None:
    key, _ = child_of(world, replace(world.caller, is_operator=True))
    child, _ = child_of(world, key)
    revoke(world, key)

    with pytest.raises(Unauthorized):
        api_keys.limit(
            world.db,
            caller=replace(key, is_operator=True),
            api_key_id=child.api_key_id,
            limits={"requests_per_minute": 0},
        )

    with world.db.read() as session:
        assert session.get_one(ApiKey, child.api_key_id).requests_per_minute == child.requests_per_minute
