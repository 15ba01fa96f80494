"""Automatic precision follows the capabilities of the workers."""

from __future__ import annotations

import pytest

from catalog.fleet import workers
from catalog.resources import pack_key as packing
from tests.catalog.world import World


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        ([], "bfloat16"),
        ([False], "float32"),
        ([False, True], "bfloat16"),
        ([None], "bfloat16"),  # a worker of an older version does not report it
    ],
)
def test_automatic_precision_follows_the_workers_at_submission(
    world: World, fleet: list[bool | None], expected: str
) -> None:
    for index, has in enumerate(fleet):
        devices = [{"kind": "cpu", **({} if has is None else {"has_bfloat16": has})}]
        given = {"host": "here", "pid": 1, "version": "1", "memory_bytes": 10**12}
        workers.register_worker(world.db, worker_id=f"w{index}", devices=devices, **given)

    automatic, explicit = world.submit(), world.submit(precision="float32")

    assert automatic.spec["precision"] == packing.precision_of(automatic.pack_key) == expected
    assert packing.precision_of(explicit.pack_key) == "float32"


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
