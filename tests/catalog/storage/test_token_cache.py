"""Token caches belong to one project: their size is charged and limited, and they reveal nothing to others."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from catalog.errors import QuotaExceeded
from catalog.history import job_logs
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.plans import claims as plan_claims
from catalog.plans import plans
from catalog.storage import files, token_cache
from catalog.storage.store import Blob
from catalog.tables.jobs import Job, Plan
from catalog.tables.storage import BaseModelRow, File, Prepared
from catalog.tables.tenancy import PLANS_PER_DAY, StoredBytes
from catalog.tenancy import api_keys, authentication, projects
from catalog.tenancy.api_keys import KeyRequest
from catalog.usage import ledger
from tests.catalog.plan_data import SETTINGS, plan, ready
from tests.catalog.prepared_data import REPORT
from tests.catalog.usage.test_quotas import limit, upload
from tests.catalog.world import PEPPER, World, begin_plan, manifest, request, sha


def twin_of(world: World, file_id: str) -> str:
    """Upload the same bytes in another project."""
    twin = world.file(caller=world.stranger)
    with world.db.write() as session:
        session.get_one(File, twin).digest = session.get_one(File, file_id).digest
    return twin


def stored(world: World) -> int:
    with world.db.read() as session:
        return ledger.stored_bytes(session, world.caller.project_id)


def test_plan_does_not_reveal_files_prepared_by_another_project(world: World) -> None:
    world.worker()
    assert ready(world).state == "ready"
    body = request(training_file=twin_of(world, world.file_id))

    theirs = plans.create(world.db, caller=world.stranger, request=body, settings=SETTINGS)

    assert theirs.state == "computing"


def test_checkpoints_and_logs_count_as_stored_bytes_until_removed(world: World) -> None:
    claim = world.running()
    before = stored(world)

    recording.record_checkpoint(world.db, claim.claim_id, step=1, artifact=manifest("a" * 100, "checkpoint"))
    content = Blob(digest=sha("log"), num_bytes=50)
    job_logs.record(world.db, claim.claim_id, worker_id="w1", rank=0, content=content)
    both = stored(world)
    for step in (2, 3):
        recording.record_checkpoint(
            world.db, claim.claim_id, step=step, artifact=manifest(f"{step}" * 10, "checkpoint")
        )

    assert both - before == 150
    assert stored(world) - before == 50 + 2 * 10, "the first checkpoint was dropped"


def test_project_keeps_four_cache_variants_and_evicts_unused_ones(world: World) -> None:
    held = world.submit(max_length=8)
    world.prepare_all()
    for max_length in range(9, 15):
        _computed(world, max_length)

    kept = _variants(world)

    assert sorted(kept) == [8, 12, 13, 14], "a queued job needs the oldest"
    assert stored(world) == sum(kept.values())
    commands.cancel(world.db, **world.of(held.id))
    _computed(world, 15)
    assert sorted(_variants(world)) == [12, 13, 14, 15]
    assert ready(world, max_length=9).state == "ready", "the result of an evicted cache is still known"


def test_cache_needed_by_a_running_plan_is_not_evicted(world: World) -> None:
    waiting = plan(world, max_length=8)
    _put(world, waiting, num_bytes=7)
    for max_length in range(9, 15):
        _computed(world, max_length)

    assert sorted(_variants(world)) == [8, 12, 13, 14]


def test_plan_is_rejected_if_its_tokens_exceed_the_storage_quota(world: World) -> None:
    limit(world, stored_bytes=25)  # the file has 10 bytes

    first = plan(world, max_length=8)
    plan(world, max_length=9)
    with pytest.raises(QuotaExceeded) as of_plan:
        plan(world, max_length=10)
    with pytest.raises(QuotaExceeded) as of_job:
        world.submit(max_length=10)

    for refusal in (of_plan, of_job):
        assert refusal.value.quota["name"] == "stored_bytes"
        assert "files that have to be prepared need 30 more" in refusal.value.message
        assert refusal.value.remedy.startswith("Use smaller files, or cancel jobs and delete plans")
    plans.delete(world.db, project_id=world.caller.project_id, plan_id=first.id)
    world.submit(max_length=10)


def test_cached_file_may_be_planned_at_the_storage_limit(world: World) -> None:
    ready(world)
    limit(world, stored_bytes=0)

    assert plan(world).state == "ready"
    with pytest.raises(QuotaExceeded):
        plan(world, max_length=8)


def test_upload_evicts_unused_caches_within_the_deleted_file_limit(world: World) -> None:
    for max_length in (8, 9):
        _computed(world, max_length, num_bytes=400)
    limit(world, stored_bytes=1000)

    upload(world, 300)
    kept = _variants(world)
    upload(world, 500)
    with pytest.raises(QuotaExceeded) as refusal:
        upload(world, 201)

    assert sorted(kept) == [9], "the oldest cache was evicted"
    assert _variants(world) == {}
    assert refusal.value.quota["used"] == 800
    for content in ("a", "b"):
        files.delete(world.db, project_id=world.caller.project_id, file_id=upload(world, 150, content=content))
    with pytest.raises(QuotaExceeded, match="800 stored bytes and 1,100 deleted bytes"):
        upload(world, 101)
    upload(world, 100)


def test_plans_per_day_are_limited(world: World) -> None:
    limit(world, plans_per_day=2)
    for length in (128, 256):
        row = plan(world, max_length=length)
        plans.delete(world.db, project_id=world.caller.project_id, plan_id=row.id)

    with pytest.raises(QuotaExceeded) as refusal:
        plan(world)
    world.clock.advance(refusal.value.retry_after_seconds)

    assert refusal.value.quota | {"resets_at": 0} == {"name": "plans_per_day", "limit": 2, "used": 2, "resets_at": 0}
    assert plan(world).state == "computing"
    assert projects.create(world.db, "fresh", organization="default").max_plans_per_day == PLANS_PER_DAY


def test_read_only_key_does_not_use_up_the_plans_of_others(world: World) -> None:
    limit(world, plans_per_day=2)
    ready(world, max_length=128)
    reader = api_keys.create(
        world.db, caller=world.caller, request=KeyRequest(name="reader", scopes=["jobs:read"]), pepper=PEPPER
    )[1]
    holder = authentication.authenticate(world.db, secret=reader, pepper=PEPPER)

    def read() -> Plan:
        body = request(training_file=world.file_id, max_length=128)
        return plans.create(world.db, caller=holder, request=body, settings=SETTINGS)

    assert [read().state, read().state] == ["ready", "ready"]
    with pytest.raises(QuotaExceeded) as refusal:
        read()

    assert plan(world, max_length=256).state == "computing"
    assert (refusal.value.quota["name"], refusal.value.quota["used"]) == ("plans_per_day", 2)
    key = f"API key {holder.api_key_id} has reached its limit of 2 plans per day in project 'ours'"
    assert key in refusal.value.message


def test_wrong_counters_are_corrected(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.running()
    ledger.reconcile(world.db)
    with world.db.write() as session:
        right = ledger.stored_bytes(session, world.caller.project_id)
        session.get_one(StoredBytes, world.caller.project_id).num_bytes = -5

    assert ledger.reconcile(world.db) == 1

    assert stored(world) == right
    assert f"project={world.caller.project_id} by={right + 5}" in caplog.text
    assert ledger.reconcile(world.db) == 0


def _computed(world: World, max_length: int, *, num_bytes: int | None = None) -> None:
    """Create a plan, prepare its file as a worker does, and conclude the plan."""
    row = plan(world, max_length=max_length)
    claim = begin_plan(world.db, "w1")
    assert claim is not None
    while claim.task.subject != row.id:
        claim = begin_plan(world.db, "w1")
        assert claim is not None
    _put(world, row, num_bytes=num_bytes or max_length)
    plan_claims.conclude(world.db, claim.task, settings=SETTINGS)


def _put(world: World, row: Plan, *, num_bytes: int) -> None:
    with world.db.read() as session:
        digest = session.get_one(File, world.file_id).digest
    tokens = manifest("t" * num_bytes, "tokens")
    world.put_tokens(row.train_prepared, file_digest=digest, artifact=tokens, report=REPORT)


def _variants(world: World) -> dict[int, int]:
    """Return the bytes of the file's stored caches by max_length."""
    with world.db.read() as session:
        works = [*session.scalars(select(Plan)), *session.scalars(select(Job))]
        named = {work.train_prepared: work.spec["max_length"] for work in works}
        rows = session.scalars(select(Prepared).where(Prepared.artifact.is_not(None)))
        return {named[row.key]: row.num_bytes for row in rows if row.key in named}


def test_a_cache_depends_on_the_template_for_tools_but_not_on_the_weights() -> None:
    def digest(**contents: str) -> str:
        paths = {"tools": "additional_chat_templates/tool_use.jinja", "weights": "model.safetensors"}
        files = [{"path": paths[name], "digest": sha(text), "num_bytes": 1} for name, text in contents.items()]
        return token_cache.tokenizer_digest(BaseModelRow(manifest={"files": files}))

    assert digest(tools="a", weights="a") == digest(tools="a", weights="b")
    assert digest(tools="a", weights="a") != digest(tools="b", weights="a")
