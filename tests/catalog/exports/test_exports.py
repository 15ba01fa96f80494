"""Exports of adapters: who may request them, how workers make them, what they store, and when they end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from catalog.caller import Caller
from catalog.db.database import read_clock
from catalog.error_texts import ErrorText
from catalog.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    RateLimited,
    StaleClaim,
)
from catalog.exports import commands, formats
from catalog.exports.commands import ExportResult
from catalog.fleet import workers
from catalog.maintenance import garbage_collection
from catalog.queue import notifier
from catalog.registry import adapters, base_models, permissions
from catalog.settings import InvalidSettings, Settings
from catalog.storage import quota
from catalog.tables.storage import Adapter, AdapterExport, Artifact
from catalog.tables.tenancy import Project
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskClaim, TaskKind
from catalog.usage import ledger
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import World, attempts, claim_task, manifest

FAULT = ErrorText(code="some_code", message="It failed.", remedy="Do this.")
SCARCE = InvalidRequest(
    ErrorText(code="export_failed", message="The export needs 9 GB, but worker w1 has 1 GB.", remedy="Wait.")
)
LLAMA: dict[str, Any] = {"architecture": "LlamaForCausalLM"}
ALLOWED: dict[str, Any] = {"allowed_repositories": ["org/*"]}


@pytest.fixture
def adapter(world: World) -> Adapter:
    world.base("llama", **LLAMA)
    adapter = world.complete(world.running(model="llama").claim_id)
    ledger.reconcile(world.db)  # the world's files are not charged
    return adapter


def share(world: World, adapter: Adapter) -> None:
    operator = replace(world.caller, is_operator=True)
    permissions.grant(world.db, caller=operator, model=adapter.name, projects_named=[world.stranger.project_id])


def create(world: World, adapter: Adapter, format: Any = "merged", **fields: Any) -> AdapterExport:  # noqa: A002
    caller: Caller = fields.pop("caller", world.caller)
    return commands.create(world.db, caller=caller, adapter=adapter.name, format=format, **fields)


def shown(world: World, row: AdapterExport) -> AdapterExport:
    return commands.get(world.db, project_id=row.project_id, adapter=row.adapter_name, export=row.id)


def claim(world: World, worker_id: str = "w1", *, skipping: Collection[str] = ()) -> commands.ExportClaim:
    task = claim_task(world.db, TaskKind.EXPORT, worker_id=worker_id, skipping=skipping)
    return commands.begin(world.db, task)


def is_any_waiting(world: World) -> bool:
    with world.db.read() as session:
        return session.scalar(task_queue.due([TaskKind.EXPORT], now=read_clock(session))) is not None


def finish(world: World, content: str = "export", task: TaskClaim | None = None) -> None:
    files = manifest(content, "export")
    result = ExportResult(manifest=files, verification={"max_abs_diff": 0.1, "tolerance": 0.2}, cost=None, hub_url=None)
    commands.finish(world.db, task or claim(world).task, result)


def charged(world: World, project_id: str) -> int:
    with world.db.read() as session:
        stored = ledger.stored_bytes(session, project_id)
        assert stored == ledger.recount(session, project_id).get(project_id, 0)
        return stored


def test_export_is_claimed_once_and_its_result_recorded(world: World, adapter: Adapter) -> None:
    row = create(world, adapter, "gguf")
    before = charged(world, row.project_id)

    assert notifier.has_work(world.db)
    held = claim(world)
    assert not notifier.has_work(world.db)
    assert (held.format, held.quantization, held.adapter_artifact) == ("gguf", "q8_0", adapter.artifact)
    assert shown(world, row).status == "running"
    finish(world, task=held.task)

    done, artifact = commands.files_of(world.db, project_id=row.project_id, adapter=adapter.id, export=row.id)
    assert (done.status, done.num_bytes, done.error) == ("succeeded", 6, None)
    assert artifact.digest == manifest("export", "export").digest
    assert charged(world, row.project_id) == before + 6


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_export_that_is_deleted_between_two_reads_still_has_its_files(world: World, adapter: Adapter) -> None:
    row = create(world, adapter)
    finish(world)
    of_row: dict[str, Any] = {"project_id": row.project_id, "adapter": adapter.id, "export": row.id}

    def delete_with_files() -> None:
        commands.delete(world.db, **of_row)
        with world.db.write() as session:
            session.delete(session.get_one(Artifact, manifest("export", "export").digest))

    after_statement(world.db, "FROM adapter_exports", delete_with_files)

    _, artifact = commands.files_of(world.db, **of_row)

    assert artifact.digest == manifest("export", "export").digest
    with pytest.raises(NotFound):
        commands.files_of(world.db, **of_row)


def test_identical_export_is_returned_and_a_failed_one_replaced(world: World, adapter: Adapter) -> None:
    row = create(world, adapter)
    assert create(world, adapter).id == row.id
    outcomes.fail(world.db, claim(world).task, commands.EXPORT, FAULT)
    assert shown(world, row).error == {"code": "some_code", "message": "It failed.", "remedy": "Do this."}

    again = create(world, adapter)

    assert again.id != row.id
    finish(world)
    assert create(world, adapter).id == again.id
    others = [create(world, adapter, "gguf-lora"), create(world, adapter, hub_repository="org/x", **ALLOWED)]
    page = commands.list_page(world.db, project_id=row.project_id, adapter=adapter.id)
    assert [one.id for one in page.items] == [others[1].id, others[0].id, again.id]


def refuse(world: World) -> None:
    commands.refuse(world.db, claim_task(world.db, TaskKind.EXPORT), SCARCE)


def test_refused_export_waits_for_another_worker_and_counts_no_attempt(world: World, adapter: Adapter) -> None:
    row = create(world, adapter)

    refuse(world)

    assert (shown(world, row).status, attempts(world.db, row.id)) == ("queued", 0)
    assert shown(world, row).error == {"code": "export_failed", "message": SCARCE.message, "remedy": "Wait."}
    assert claim(world).export_id == row.id
    assert (shown(world, row).error, shown(world, row).refused_since) == (None, None)


def test_export_fails_if_no_worker_has_taken_it_a_day_after_the_first_refusal(world: World, adapter: Adapter) -> None:
    row, hours = create(world, adapter), int(commands.MAX_WAIT_SECONDS / 3600)
    for _ in range(hours):
        refuse(world)
        assert shown(world, row).status == "queued"
        world.clock.advance(3600)

    refuse(world)

    done = shown(world, row)
    assert done.status == "failed"
    assert not is_any_waiting(world)
    assert done.error == {
        "code": "export_failed",
        "message": f"{SCARCE.message} No worker has taken the export for {hours} hours.",
        "remedy": "Wait. Then create the export again.",
    }


def test_attempt_between_two_refusals_begins_another_day(world: World, adapter: Adapter) -> None:
    row = create(world, adapter)
    refuse(world)
    world.clock.advance(commands.MAX_WAIT_SECONDS)
    outcomes.release(world.db, claim(world).task, commands.EXPORT)

    refuse(world)

    assert shown(world, row).status == "queued"


def test_attempt_that_may_be_the_node_s_fault_is_repeated_a_few_times(world: World, adapter: Adapter) -> None:
    row = create(world, adapter)
    for number in range(1, MAX_ATTEMPTS[TaskKind.EXPORT]):
        outcomes.retry(world.db, claim(world).task, commands.EXPORT, FAULT)
        assert not is_any_waiting(world)
        assert (shown(world, row).status, shown(world, row).error) == ("queued", FAULT.report())
        world.clock.advance(task_queue.retry_wait(number))

    outcomes.retry(world.db, claim(world).task, commands.EXPORT, FAULT)

    assert shown(world, row).status == "failed"


def test_cancelled_export_is_not_recorded_and_can_be_requested_again(world: World, adapter: Adapter) -> None:
    row = create(world, adapter)
    held = claim(world)
    where = {"project_id": row.project_id, "adapter": adapter.id, "export": row.id}

    assert commands.cancel(world.db, **where).status == "cancelled"

    assert commands.cancel(world.db, **where).status == "cancelled"
    with pytest.raises(StaleClaim):
        finish(world, task=held.task)
    assert create(world, adapter).status == "queued"
    finish(world)
    done = commands.list_page(world.db, project_id=row.project_id, adapter=adapter.id).items[0]
    with pytest.raises(Conflict, match="can't be cancelled, because its status is 'succeeded'"):
        commands.cancel(world.db, project_id=row.project_id, adapter=adapter.id, export=done.id)


def test_deleted_adapter_takes_its_exports_with_it_and_their_files_are_collected(
    world: World, adapter: Adapter
) -> None:
    row, digest = create(world, adapter), manifest("export", "export").digest
    before = charged(world, row.project_id) - len("adapter")
    finish(world)
    create(world, adapter, "gguf")
    held = claim(world)
    garbage_collection.drop_references(world.db)
    assert digest in garbage_collection.live_digests(world.db)

    adapters.delete(world.db, project_id=row.project_id, name=adapter.name)

    with pytest.raises(StaleClaim):
        finish(world, task=held.task)
    with pytest.raises(NotFound):
        shown(world, row)
    garbage_collection.drop_references(world.db)
    assert digest not in garbage_collection.live_digests(world.db)
    assert charged(world, row.project_id) == before


def test_deleted_export_is_no_longer_charged(world: World, adapter: Adapter) -> None:
    before = charged(world, adapter.project_id)
    row = create(world, adapter)
    finish(world)
    where: dict[str, Any] = {"project_id": row.project_id, "adapter": adapter.name, "export": row.id}

    assert commands.delete(world.db, **where) == row.id

    assert charged(world, row.project_id) == before
    with pytest.raises(NotFound):
        commands.delete(world.db, **where)
    assert commands.delete(world.db, **where, is_client_retry=True) == row.id


def test_stored_bytes_are_limited_when_an_export_is_requested_and_when_it_is_stored(
    world: World, adapter: Adapter
) -> None:
    limit(world, adapter.project_id, charged(world, adapter.project_id) + 5)
    with pytest.raises(QuotaExceeded):
        create(world, adapter)  # the base model has 10,000 parameters
    limit(world, adapter.project_id, None)
    row = create(world, adapter)
    held = claim(world)
    limit(world, adapter.project_id, 1)

    with pytest.raises(QuotaExceeded):
        finish(world, task=held.task)

    assert shown(world, row).status == "running"
    assert shown(world, row).artifact is None


def test_unfinished_exports_count_toward_the_stored_bytes(world: World, adapter: Adapter) -> None:
    used = charged(world, adapter.project_id)
    limit(world, adapter.project_id, used + 45_000)  # a merged model has 20,000 bytes, and a GGUF model 10,625
    first = create(world, adapter, "merged")
    second = create(world, adapter, "gguf", quantization="f16")

    with pytest.raises(QuotaExceeded, match="its unfinished exports need about 40,000, and this request needs 10,625"):
        create(world, adapter, "gguf")
    with pytest.raises(QuotaExceeded, match="unfinished exports"), world.db.read() as session:
        quota.precheck_stored(session, adapter.project_id, 10_000, now=0)

    assert (first.expected_bytes, second.expected_bytes) == (20_000, 20_000)
    commands.cancel(world.db, project_id=first.project_id, adapter=adapter.id, export=first.id)
    create(world, adapter, "gguf")
    limit(world, adapter.project_id, used + 6)
    finish(world)  # an export that has room of its own does not fail because of the estimates of others


def test_base_model_of_an_unfinished_export_cannot_be_deleted(world: World, adapter: Adapter) -> None:
    row = create(world, adapter, "gguf")

    with pytest.raises(Conflict, match=f"in use by export {row.id}") as caught:
        base_models.delete(world.db, adapter.base_model)

    assert (caught.value.code, "cancel them" in caught.value.remedy) == ("in_use", True)
    commands.cancel(world.db, project_id=row.project_id, adapter=adapter.id, export=row.id)
    create(world, adapter, "adapter", hub_repository="org/x", **ALLOWED)
    base_models.delete(world.db, adapter.base_model)


@pytest.mark.parametrize(
    ("allowed", "reason"), [((), "LORRY_HUB_REPOSITORIES is empty"), (("org/y", "org/x-*", "*/z"), "does not contain")]
)
def test_upload_to_a_repository_that_the_operator_does_not_list_is_refused(
    world: World, adapter: Adapter, allowed: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(Forbidden, match=reason) as caught:
        create(world, adapter, hub_repository="org/x", allowed_repositories=allowed)

    assert (caught.value.code, caught.value.param) == ("integration_unavailable", "hub_repository")
    assert "org/x or org/*" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "repository", "is_allowed"),
    [
        ("org/x", "org/x", True),
        (" other/y , org/* ", "org/x", True),
        ("org/x-*", "org/x-1", True),
        ("org/*", "organization/x", False),
        ("org/*", "my-org/x", False),
        ("org/x", "org/x-1", False),
        ("Org/x", "org/x", False),
        ("", "org/x", False),
    ],
)
def test_setting_lists_repositories(text: str, repository: str, is_allowed: bool) -> None:
    patterns = Settings(hub_repositories=text).named_hub_repositories()

    if is_allowed:
        formats.check_hub_repository(repository, patterns)
    else:
        with pytest.raises(Forbidden):
            formats.check_hub_repository(repository, patterns)


@pytest.mark.parametrize("text", ["org", "*", "org/x/y", "org/[a-z]", "org/x;other/y", "../x"])
def test_setting_with_an_invalid_repository_is_rejected(text: str) -> None:
    with pytest.raises(InvalidSettings, match="is not a repository"):
        Settings(hub_repositories=text)


def limit(world: World, project_id: str, stored: int | None) -> None:
    with world.db.write() as session:
        session.get_one(Project, project_id).max_stored_bytes = stored


def test_shared_adapter_is_exported_into_the_reader_s_project(world: World, adapter: Adapter) -> None:
    with pytest.raises(NotFound):
        create(world, adapter, caller=world.stranger)
    share(world, adapter)

    row = create(world, adapter, caller=world.stranger)
    finish(world)

    assert row.project_id == world.stranger.project_id
    assert charged(world, world.stranger.project_id) == len("export")
    assert commands.list_page(world.db, project_id=world.caller.project_id, adapter=adapter.id).items == []
    with pytest.raises(NotFound, match="Your project has no export"):
        commands.get(world.db, project_id=world.caller.project_id, adapter=adapter.id, export=row.id)


def test_projects_take_turns(world: World, adapter: Adapter) -> None:
    first = create(world, adapter, "merged")
    second = create(world, adapter, "gguf")
    share(world, adapter)
    of_another = create(world, adapter, "merged", caller=world.stranger)

    order = [claim(world, f"w{number}").export_id for number in range(3)]

    assert order == [first.id, of_another.id, second.id]


def test_unfinished_exports_of_a_project_are_limited(world: World, adapter: Adapter) -> None:
    create(world, adapter, max_open=1)

    with pytest.raises(RateLimited, match="1 unfinished exports"):
        create(world, adapter, "gguf", max_open=1)


@pytest.fixture
def gemma(world: World) -> Adapter:
    world.base("gemma", architecture="Gemma3ForCausalLM")
    return world.complete(world.running(model="gemma").claim_id)


def test_architecture_without_gguf_is_rejected_with_the_ways_out(world: World, gemma: Adapter) -> None:
    with pytest.raises(InvalidRequest, match="'Gemma3ForCausalLM' can't be exported as 'gguf': no running") as caught:
        create(world, gemma, "gguf")

    assert "Set LORRY_GGUF_CONVERTER on a worker" in caught.value.remedy
    assert "Or use the format 'merged'. Without the converter, Lorry writes GGUF for Llama" in caught.value.remedy
    with pytest.raises(InvalidRequest, match="can't be exported as 'gguf-lora'") as caught:
        create(world, gemma, "gguf-lora")
    assert caught.value.remedy.startswith("Use the format 'merged'.")
    assert create(world, gemma, "merged").status == "queued"


def test_worker_with_the_converter_makes_gguf_of_any_architecture(
    world: World, gemma: Adapter, adapter: Adapter
) -> None:
    world.worker("w2", integrations=(workers.GGUF_CONVERTER,))

    row, own = create(world, gemma, "gguf"), create(world, adapter, "gguf")

    waiting = [commands.inspect(world.db, claim_task(world.db, TaskKind.EXPORT)) for _ in range(2)]
    needs = {each.export_id: each.needs_converter for each in waiting}
    assert needs == {row.id: True, own.id: False}
    with pytest.raises(InvalidRequest, match="can't be exported as 'gguf-lora'") as caught:
        create(world, gemma, "gguf-lora")
    assert caught.value.remedy.startswith("Use the format 'gguf'.")


def test_dora_adapter_is_no_lora_file(world: World) -> None:
    world.base("llama", **LLAMA)
    adapter = world.complete(world.running(model="llama", lora={"use_dora": True}).claim_id)

    with pytest.raises(InvalidRequest, match="uses DoRA can't be exported as 'gguf-lora'"):
        create(world, adapter, "gguf-lora")
    assert create(world, adapter, "gguf").status == "queued"


def test_deleted_base_model_prevents_all_exports_but_uploads_of_the_adapter(world: World, adapter: Adapter) -> None:
    base_models.delete(world.db, adapter.base_model)

    with pytest.raises(Conflict, match="was deleted or replaced"):
        create(world, adapter, "merged")
    row = create(world, adapter, "adapter", hub_repository="org/x", **ALLOWED)
    commands.finish(world.db, claim(world).task, ExportResult(manifest=None, verification=None, cost=None, hub_url="u"))
    assert (shown(world, row).status, shown(world, row).hub_url) == ("succeeded", "u")
    with pytest.raises(Conflict, match="stores no files"):
        commands.files_of(world.db, project_id=row.project_id, adapter=adapter.id, export=row.id)


@pytest.mark.parametrize(
    ("format", "quantization", "expected"),
    [("merged", None, 2_000), ("gguf", "f16", 2_000), ("gguf", "q8_0", 1_062), ("gguf-lora", None, 40)],
)
def test_size_is_estimated_before_an_export(format: Any, quantization: str | None, expected: int) -> None:  # noqa: A002
    description = {"num_parameters": 1_000, "dtype": "bfloat16"}

    found = formats.estimated_bytes(format, quantization, description=description, adapter_parameters=10)

    assert found == expected
