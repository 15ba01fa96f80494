"""Precision and slice size follow the workers that are live when a job is accepted."""

from __future__ import annotations

import pytest

from catalog.fleet import workers
from catalog.resources.memory import SLICE_TOKENS
from catalog.resources.pack_key import precision_of
from tests.catalog.world import World


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        ([], "bfloat16"),
        ([False], "float32"),
        ([False, True], "bfloat16"),
    ],
)
def test_automatic_precision_follows_the_workers_at_submission(world: World, fleet: list[bool], expected: str) -> None:
    for index, has in enumerate(fleet):
        devices = [{"kind": "cpu", "has_bfloat16": has}]
        given = {"host": "here", "pid": 1, "version": "1", "memory_bytes": 10**12}
        workers.register_worker(world.db, worker_id=f"w{index}", devices=devices, **given)

    automatic, explicit = world.submit(), world.submit(precision="float32")

    assert automatic.spec["precision"] == precision_of(automatic.pack_key) == expected
    assert precision_of(explicit.pack_key) == "float32"


@pytest.mark.parametrize(("seen", "expected"), [([True, False], "float32"), ([False, True], "bfloat16")])
def test_automatic_precision_follows_the_last_worker_if_none_is_live(
    world: World, seen: list[bool], expected: str
) -> None:
    for index, has in enumerate(seen):
        given = {"host": "here", "pid": 1, "version": "1", "memory_bytes": 10**12}
        devices = [{"kind": "cpu", "has_bfloat16": has}]
        workers.register_worker(world.db, worker_id=f"w{index}", devices=devices, **given)
        world.clock.advance(3600)

    assert world.submit().spec["precision"] == expected


@pytest.mark.parametrize(("kinds", "expected"), [([], "cpu"), (["cpu"], "cpu"), (["cpu", "cuda"], "cuda")])
def test_slices_have_the_size_for_gpus_if_one_is_live_and_keep_it(
    world: World, kinds: list[str], expected: str
) -> None:
    for index, kind in enumerate(kinds):
        given = {"host": "here", "pid": 1, "version": "1", "memory_bytes": 10**12}
        workers.register_worker(world.db, worker_id=f"w{index}", devices=[{"kind": kind}], **given)

    job = world.submit()

    assert job.spec["slice_tokens"] == SLICE_TOKENS[expected]
