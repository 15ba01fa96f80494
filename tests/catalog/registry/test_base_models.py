"""Base models: named once, imported by one worker at a time, and identified by the digest of their files."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from typing import Any

import pytest

from catalog.datasets.chat_templates import TEMPLATES
from catalog.error_texts import ErrorText
from catalog.errors import Conflict, InvalidRequest, NotFound, StaleClaim
from catalog.jobs import commands
from catalog.registry import adapters, base_models
from catalog.registry.base_models import SOURCE_PATTERN
from catalog.spec.data import DataOptions
from catalog.storage import token_cache
from catalog.storage.manifest import files_digest
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskClaim, TaskKind
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import DESCRIPTION, LEASE, World, manifest, sha, try_claim

FAULT = ErrorText(code="no_such_repo", message="It is gone.", remedy="Use another.")


@pytest.mark.parametrize(
    ("name", "kind", "source", "code", "fragment"),
    [
        ("a/b", "hub", "org/b", "invalid_value", "it contains '/'"),
        ("b\n", "hub", "org/b", "invalid_value", r"it contains '\n'"),
        ("b", "pickle", "org/b", "invalid_value", "must be 'hub', 'folder' or 'gguf'"),
        ("b", "hub", " ", "invalid_value", "is blank"),
        ("b", "folder", "\x19", "invalid_value", r"'\x19' at position 1."),
        ("b", "folder", "/models/a\n", "invalid_value", r"'\n' at position 10."),
    ],
)
def test_base_with_an_invalid_name_kind_or_source_is_rejected(
    world: World, name: str, kind: str, source: str, code: str, fragment: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        base_models.add(world.db, name=name, kind=kind, source=source, revision=None)

    assert refusal.value.code == code
    assert fragment in refusal.value.message


EDGES = [chr(code) for code in (*range(0x100), 0x1680, 0x2003, 0x2028, 0x2029, 0x202F, 0x3000, 0xFEFF, 0xD800, 0x1F600)]


def test_source_pattern_rejects_blanks_and_control_characters() -> None:
    pairs = [one + other for one, other in product(EDGES, repeat=2)]
    texts = ["", *EDGES, *pairs, *(f" {edge}a" for edge in EDGES), *(f"a{edge} " for edge in EDGES)]

    def is_source(text: str) -> bool:
        has_control = any(char < " " or char == "\x7f" for char in text)
        return not has_control and not text.isspace() and text != ""

    assert [text for text in texts if bool(re.fullmatch(SOURCE_PATTERN, text)) != is_source(text)] == []


def test_source_pattern_matches_in_linear_time() -> None:
    """No character matches both the leading spaces and the first other character, so there is no backtracking."""
    before, first, _ = re.findall(r"\[[^]]+\]", SOURCE_PATTERN)

    assert [char for char in EDGES if re.match(before, char) and re.match(first, char)] == []


@pytest.mark.both_databases
def test_one_worker_imports_a_base_and_another_takes_over_after_its_lease(world: World) -> None:
    base_models.add(world.db, name="b", kind="hub", source="org/b", revision=None)
    with ThreadPoolExecutor(4) as pool:
        claimed = [found for found in pool.map(lambda _: try_claim(world.db, TaskKind.IMPORT), range(8)) if found]
    (task,) = claimed
    assert task.subject == "b"

    world.clock.advance(50)
    assert task_queue.renew(world.db, task, lease_seconds=60)
    world.clock.advance(50)
    assert try_claim(world.db, TaskKind.IMPORT) is None

    world.clock.advance(20)
    assert try_claim(world.db, TaskKind.IMPORT) is not None


def test_import_that_kills_every_worker_fails_and_can_be_repeated(world: World) -> None:
    wanted: dict[str, Any] = {"name": "b", "kind": "hub", "source": "org/b"}
    base_models.add(world.db, **wanted)

    for _ in range(MAX_ATTEMPTS[TaskKind.IMPORT]):
        assert not _claim(world).is_exhausted
        world.clock.advance(LEASE + 1)
    outcomes.fail_lost(world.db, _claim(world), base_models.IMPORT)

    failed = base_models.get(world.db, "b")
    assert (failed.state, (failed.error or {})["code"]) == ("failed", "import_failed")
    assert "5 workers were lost" in (failed.error or {})["message"]
    assert try_claim(world.db, TaskKind.IMPORT) is None
    assert base_models.add(world.db, **wanted).state == "importing"
    assert not _claim(world).is_exhausted


def test_failed_import_keeps_its_error_and_is_retried_when_added_again(world: World) -> None:
    base_models.add(world.db, name="b", kind="hub", source="org/b", revision=None)
    world.fail_import("b", FAULT.report())

    assert base_models.get(world.db, "b").error == FAULT.report()
    assert try_claim(world.db, TaskKind.IMPORT) is None
    assert base_models.add(world.db, name="b", kind="hub", source="org/b", revision=None).state == "importing"
    assert try_claim(world.db, TaskKind.IMPORT) is not None


def test_base_that_was_never_ready_can_get_another_source(world: World) -> None:
    base_models.add(world.db, name="b", kind="hub", source="org/mistyped", revision=None)
    world.fail_import("b", FAULT.report())

    fixed = base_models.add(world.db, name="b", kind="folder", source="/models/b", revision=None)

    assert (fixed.state, fixed.source, fixed.error) == ("importing", "/models/b", None)
    world.finish_import("b", digest=sha("b"), description={})
    with pytest.raises(Conflict, match="the kind 'folder', the source '/models/b', no revision"):
        base_models.add(world.db, name="b", kind="hub", source="org/mistyped", revision=None)


def test_template_belongs_to_the_identity_of_a_base_model(world: World) -> None:
    given = {"name": "b", "kind": "hub", "source": "org/b"}
    named = base_models.add(world.db, **given, chat_template="chatml")

    assert named.chat_template == TEMPLATES["chatml"]
    assert base_models.add(world.db, **given, chat_template=TEMPLATES["chatml"]).name == "b"
    for other in (None, "zephyr", "{{ messages }}"):
        with pytest.raises(Conflict, match="no revision and a given chat template"):
            base_models.add(world.db, **given, chat_template=other)


def test_unknown_name_of_a_template_is_rejected(world: World) -> None:
    with pytest.raises(InvalidRequest, match="'vicuna'") as refused:
        base_models.add(world.db, name="b", kind="hub", source="org/b", chat_template="vicuna")

    assert "chatml, gemma, llama3, zephyr" in str(refused.value.remedy)


def test_worker_that_lost_its_import_lease_changes_nothing(world: World) -> None:
    fields = {"manifest": {"files": []}, "description": {}}
    base_models.add(world.db, name="b", kind="hub", source="org/b")
    late = _claim(world)
    world.clock.advance(61)
    holder = _claim(world)

    with pytest.raises(StaleClaim):
        base_models.finish_import(world.db, late, digest=sha("changed"), **fields)
    with pytest.raises(StaleClaim):
        outcomes.fail(world.db, late, base_models.IMPORT, FAULT)
    assert base_models.get(world.db, "b").state == "importing"
    base_models.finish_import(world.db, holder, digest=sha("b"), **fields)
    with pytest.raises(StaleClaim):
        base_models.finish_import(world.db, late, digest=sha("changed"), **fields)
    with pytest.raises(StaleClaim):
        outcomes.fail(world.db, late, base_models.IMPORT, FAULT)

    row = base_models.get(world.db, "b")
    assert (row.state, row.digest, row.error) == ("ready", sha("b"), None)


def test_digest_of_a_base_depends_on_its_files_alone() -> None:
    files = [{"path": "a", "digest": "0", "num_bytes": 1}]

    digests = {files_digest({"files": files, "source": source}) for source in ("x", "y")}

    assert len(digests) == 1


def test_token_cache_key_includes_all_inputs_of_the_tokens(world: World) -> None:
    key = token_cache.key("ours", "file", "tokenizer", 512)
    assert token_cache.get(world.db, key) is None

    world.put_tokens(
        key,
        file_digest="file",
        artifact=manifest("t", "tokens"),
        report={"rows": 1},
    )
    again = world.put_tokens(
        key,
        file_digest="file",
        artifact=manifest("t", "tokens"),
        report={"rows": 2},
    )

    assert (
        len({key, token_cache.key("ours", "file", "tokenizer", 513), token_cache.key("ours", "file", "other", 512)})
        == 3
    )
    assert (again.report, again.artifact) == ({"rows": 2}, manifest("t", "tokens").digest)
    refused = world.put_tokens(
        "k",
        file_digest="file",
        artifact=None,
        report={"refusal": {"code": "x"}},
    )
    assert refused.artifact is None


def test_deleted_base_frees_its_name_and_keeps_trained_adapters(world: World) -> None:
    adapter = world.complete(world.running().claim_id)

    base_models.delete(world.db, "smol")

    with pytest.raises(NotFound):
        base_models.get(world.db, "smol")
    with pytest.raises(NotFound):
        base_models.delete(world.db, "smol")
    with pytest.raises(NotFound):
        world.submit()
    assert base_models.list_all(world.db) == []
    again = base_models.add(world.db, name="smol", kind="hub", source="org/other", revision="r")
    assert (again.state, again.source, again.digest, again.manifest) == ("importing", "org/other", None, None)
    world.finish_import("smol", digest=sha("other"), description=DESCRIPTION)
    assert world.submit().base_digest == sha("other")
    kept = adapters.get(world.db, project_id=world.caller.project_id, name=adapter.name).adapter
    assert (kept.base_model, kept.base_digest, kept.artifact) == ("smol", sha("smol"), adapter.artifact)
    assert world.job(adapter.job_id).base_digest == sha("smol")


@pytest.mark.parametrize("state", ["validating_files", "queued", "running", "paused"])
def test_base_of_an_unfinished_job_cannot_be_deleted(world: World, state: str) -> None:
    job = world.submit()
    if state in ("queued", "running"):
        world.prepare_all()
    if state == "running":
        world.claim()
    if state == "paused":
        commands.pause(world.db, **world.of(job.id))
    assert world.job(job.id).state == state

    with pytest.raises(Conflict) as refusal:
        base_models.delete(world.db, "smol")

    assert refusal.value.code == "in_use"
    assert job.id in refusal.value.message
    assert base_models.get(world.db, "smol").state == "ready"


def test_import_does_not_restore_a_base_deleted_meanwhile(world: World) -> None:
    fields = {"manifest": {"files": []}, "description": {}}
    base_models.add(world.db, name="b", kind="hub", source="org/b")
    old = _claim(world)

    base_models.delete(world.db, "b")
    assert not task_queue.renew(world.db, old, lease_seconds=60)
    with pytest.raises(StaleClaim):
        base_models.finish_import(world.db, old, digest=sha("b"), **fields)
    with pytest.raises(StaleClaim):
        outcomes.fail(world.db, old, base_models.IMPORT, FAULT)
    with pytest.raises(NotFound):
        base_models.get(world.db, "b")
    assert try_claim(world.db, TaskKind.IMPORT) is None

    base_models.add(world.db, name="b", kind="folder", source="/models/b")
    with pytest.raises(StaleClaim):
        base_models.finish_import(world.db, old, digest=sha("b"), **fields)
    with pytest.raises(StaleClaim):
        outcomes.fail(world.db, old, base_models.IMPORT, FAULT)
    assert base_models.get(world.db, "b").state == "importing"
    base_models.finish_import(world.db, _claim(world), digest=sha("new"), **fields)
    assert base_models.get(world.db, "b").digest == sha("new")


def _claim(world: World) -> TaskClaim:
    claimed = try_claim(world.db, TaskKind.IMPORT)
    assert claimed is not None
    return claimed


def test_concurrent_deletion_and_submission_do_not_both_succeed(world: World) -> None:
    def submit(name: str) -> bool:
        with suppress(NotFound):
            world.submit(model=name)
            return True
        return False

    def delete(name: str) -> bool:
        with suppress(Conflict):
            base_models.delete(world.db, name)
            return True
        return False

    names = [world.base(f"b{number}") for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        both = [(pool.submit(submit, name), pool.submit(delete, name)) for name in names]

    assert all(submitted.result() != deleted.result() for submitted, deleted in both)


def test_token_cache_key_includes_loss_and_overflow_options() -> None:
    given = [None, DataOptions(loss="last_turn"), DataOptions(overflow="drop"), DataOptions(overflow="split")]

    assert len({token_cache.key("ours", "file", "tokenizer", 512, data) for data in given}) == 4
    assert token_cache.key("ours", "file", "tokenizer", 512, DataOptions()) == token_cache.key(
        "ours", "file", "tokenizer", 512
    )


def test_only_former_bases_of_this_database_count_as_deleted(world: World) -> None:
    world.base("kept")
    world.base("twin")
    job = world.queued(model="kept")
    folders = [sha(name) for name in ("smol", "kept", "twin", "of another database")]
    assert base_models.deleted(world.db, folders) == set()

    base_models.delete(world.db, "smol")
    commands.cancel(world.db, **world.of(job.id))
    base_models.delete(world.db, "kept")

    assert base_models.deleted(world.db, folders) == {sha("smol"), sha("kept")}
    assert base_models.deleted(world.db, [sha("of another database")]) == set()


def test_base_that_was_deleted_and_added_again_is_kept(world: World) -> None:
    claim = world.running()
    world.complete(claim.claim_id)
    base_models.delete(world.db, "smol")
    base_models.add(world.db, name="smol", kind="folder", source="/models/other")
    assert base_models.deleted(world.db, [sha("smol")]) == {sha("smol")}

    world.finish_import("smol", digest=sha("smol"), description={})

    assert base_models.deleted(world.db, [sha("smol")]) == set()


@pytest.mark.both_databases
def test_base_that_is_imported_while_deleted_ones_are_read_is_kept(world: World) -> None:
    base_models.delete(world.db, "smol")
    base_models.add(world.db, name="smol", kind="folder", source="/models/other")
    finished: list[str] = []

    def finish() -> None:
        world.finish_import("smol", digest=sha("smol"), description={})
        finished.append("smol")

    after_statement(world.db, "base_models.state !=", finish)

    assert base_models.deleted(world.db, [sha("smol")]) == set()
    assert finished


def test_no_base_counts_as_deleted_during_an_import(world: World) -> None:
    """The import may find the folder of a deleted base model with the same digest, and not create it again."""
    base_models.delete(world.db, "smol")
    base_models.add(world.db, name="again", kind="folder", source="/models/smol")
    assert base_models.deleted(world.db, [sha("smol")]) == {sha("smol")}

    claim_id = _claim(world)

    assert base_models.deleted(world.db, [sha("smol")]) == set()
    outcomes.fail(world.db, claim_id, base_models.IMPORT, FAULT)
    assert base_models.deleted(world.db, [sha("smol")]) == {sha("smol")}
