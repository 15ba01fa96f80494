"""Base models: named once, imported by one worker at a time, fixed by the digest of their files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from catalog import bases, prepared
from catalog.errors import Conflict, InvalidRequest, NotFound
from tests.catalog.world import World, manifest, sha


def test_adding_the_same_base_again_changes_nothing_and_another_is_refused(world: World) -> None:
    first = bases.add(world.db, name="b", kind="hub", source="org/b", revision="main")
    again = bases.add(world.db, name="b", kind="hub", source="org/b", revision="main")

    assert (first.state, again.created_at) == ("importing", first.created_at)
    with pytest.raises(Conflict) as refusal:
        bases.add(world.db, name="b", kind="hub", source="org/c", revision="main")
    assert refusal.value.code == "model_exists"


@pytest.mark.parametrize(
    ("name", "kind", "source", "code"),
    [
        ("a/b", "hub", "org/b", "invalid_name"),
        ("b\n", "hub", "org/b", "invalid_name"),
        ("b", "pickle", "org/b", "invalid_kind"),
        ("b", "hub", " ", "invalid_source"),
    ],
)
def test_a_base_that_cannot_be_named_or_found_is_refused(
    world: World, name: str, kind: str, source: str, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        bases.add(world.db, name=name, kind=kind, source=source, revision=None)

    assert refusal.value.code == code


def test_one_worker_imports_a_base_and_another_takes_over_when_it_falls_silent(world: World) -> None:
    bases.add(world.db, name="b", kind="hub", source="org/b", revision=None)
    with ThreadPoolExecutor(4) as pool:
        claimed = [row for row in pool.map(lambda _: bases.claim_import(world.db, lease_seconds=60), range(8)) if row]
    assert [row.name for row in claimed] == ["b"]

    world.clock.turn(50)
    bases.renew_import(world.db, "b", lease_seconds=60)
    world.clock.turn(50)
    assert bases.claim_import(world.db, lease_seconds=60) is None

    world.clock.turn(20)
    assert bases.claim_import(world.db, lease_seconds=60) is not None


def test_a_failed_import_tells_why_and_is_tried_again_when_added_again(world: World) -> None:
    bases.add(world.db, name="b", kind="hub", source="org/b", revision=None)
    bases.claim_import(world.db, lease_seconds=60)
    bases.fail_import(world.db, "b", error={"code": "no_such_repo", "message": "It is gone."})

    assert bases.get(world.db, "b").error == {"code": "no_such_repo", "message": "It is gone."}
    assert bases.claim_import(world.db, lease_seconds=60) is None
    assert bases.add(world.db, name="b", kind="hub", source="org/b", revision=None).state == "importing"
    assert bases.claim_import(world.db, lease_seconds=60) is not None


def test_a_base_keeps_the_digest_that_it_had_first(world: World) -> None:
    told = {"manifest": {"files": []}, "description": {}}

    bases.finish_import(world.db, "smol", digest=sha("smol"), **told)
    with pytest.raises(Conflict) as refusal:
        bases.finish_import(world.db, "smol", digest=sha("changed"), **told)
    bases.fail_import(world.db, "smol", error={})

    assert refusal.value.code == "base_changed"
    assert bases.get(world.db, "smol").state == "ready"


def test_bases_are_listed_and_found_by_name(world: World) -> None:
    world.base("another")

    assert [row.name for row in bases.list_all(world.db)] == ["another", "smol"]
    with pytest.raises(NotFound, match="'none'") as refusal:
        bases.get(world.db, "none")
    assert refusal.value.code == "model_not_found"
    assert "another, smol" in refusal.value.remedy


def test_a_bases_digest_is_that_of_its_files_alone() -> None:
    files = [{"path": "a", "digest": "0", "num_bytes": 1}]

    digests = {bases.files_digest({"files": files, "source": source}) for source in ("x", "y")}

    assert len(digests) == 1


def test_a_token_cache_is_found_by_all_that_decides_its_tokens(world: World) -> None:
    key = prepared.key("file", "tokenizer", 512)
    assert prepared.get(world.db, key) is None

    prepared.put(world.db, key, file_digest="file", artifact=manifest("t", "tokens"), report={"rows": 1})
    again = prepared.put(world.db, key, file_digest="file", artifact=manifest("t", "tokens"), report={"rows": 2})

    assert len({key, prepared.key("file", "tokenizer", 513), prepared.key("file", "other", 512)}) == 3
    assert (again.report, again.artifact) == ({"rows": 2}, manifest("t", "tokens").digest)
    refused = prepared.put(world.db, "k", file_digest="file", artifact=None, report={"refusal": {"code": "x"}})
    assert refused.artifact is None
