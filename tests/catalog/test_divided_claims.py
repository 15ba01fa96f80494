"""Claims of a worker with several devices find what fits a divided base, on both databases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog import claims, explanation, jobs, needs
from catalog.dividing import Group, Wanted
from catalog.scheduling.picture import Room
from catalog.states import EndReason
from catalog.tables import Job
from tests.catalog.plan_data import ready
from tests.catalog.test_plans import codes, found
from tests.catalog.world import World

BLOCKS = {"count": 10, "num_parameters": 9 * 10**9, "largest_parameters": 9 * 10**8}
LARGE: dict[str, Any] = {"num_parameters": 10**10, "blocks": BLOCKS}
"""20 GB in bf16, 18 of them blocks. Each of two devices needs 2 + 9 + 3 · 1.8 = 16.4 GB, each of four 11.9, and of
eight 9.65."""
GB = 10**9


def group(number: int, gigabytes: float, wanted: Wanted = "auto") -> Room:
    held = int(gigabytes * GB)
    return Room(max_jobs=4, memory_bytes_free=held, group=Group(num_devices=number, bytes_of_each=held, wanted=wanted))


def on(world: World, number: int, gigabytes: float, wanted: Wanted = "auto") -> Room:
    """The room of a worker that has registered so."""
    room = group(number, gigabytes, wanted)
    register(world, room)
    return room


def register(world: World, room: Room, *, worker_id: str = "w1") -> None:
    devices = [{"kind": "cpu", "num_processes": room.group.num_devices, "strategy": room.group.wanted}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1"}
    claims.register_worker(world.db, worker_id=worker_id, memory_bytes=room.memory_bytes_free, **about)


def queued_large(world: World, **fields: Any) -> Job:
    world.base("large", **LARGE)
    return world.queued(model="large", precision="bfloat16", **fields)


@pytest.mark.parametrize(
    ("number", "gigabytes", "wanted", "is_taken"),
    [
        (1, 21, "auto", True),
        (1, 17, "auto", False),
        (2, 17, "auto", True),
        (2, 16, "auto", False),
        (4, 12.5, "auto", True),
        (8, 10, "auto", True),
        (2, 17, "replicated", False),
        (2, 17, "fsdp2", True),
        (2, 21, "fsdp2", True),
        (2, 16, "zero3", False),
    ],
)
def test_a_job_is_taken_where_its_share_fits(
    world: World, number: int, gigabytes: float, wanted: Wanted, is_taken: bool
) -> None:
    room = on(world, number, gigabytes, wanted)
    job = queued_large(world)

    assert [claim.job.id for claim in world.claim(room=room)] == ([job.id] if is_taken else [])


def test_many_that_fit_nowhere_whole_hide_nobody(world: World) -> None:
    room = on(world, 2, 17)
    world.flood(queued_large(world, lora={"use_dora": True}), 40)
    plain = world.queued(model="large", precision="bfloat16")

    assert [claim.job.id for claim in world.claim(room=room)] == [plain.id]


def test_a_job_with_dora_waits_with_a_sentence_and_is_taken_where_the_whole_base_fits(world: World) -> None:
    room = on(world, 2, 17)
    job = queued_large(world, lora={"use_dora": True})

    assert world.claim(room=room) == []
    told = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "It needs about 20.0 GB and the largest worker has 17.0 GB. DoRA reads the base's weights" in told
    assert "It would fit one GPU of 24 GB." in told

    roomy = on(world, 2, 21)
    assert [claim.job.id for claim in world.claim(room=roomy)] == [job.id]


def test_a_worker_that_divides_every_base_takes_no_job_that_needs_whole_weights(world: World) -> None:
    room = on(world, 2, 100, "fsdp2")
    job = queued_large(world, lora={"init_lora_weights": "pissa"})

    assert world.claim(room=room) == []
    told = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "divides every base among its devices (LORRY_STRATEGY is fsdp2). pissa decomposes" in told


def test_who_joins_a_divided_base_would_have_it_divided_alone(world: World) -> None:
    small, large = queued_large(world), world.queued(model="large", precision="bfloat16", lora={"rank": 256})
    room = on(world, 2, (whole_bytes(large) - 1) / GB)
    assert whole_bytes(small) < room.memory_bytes_free

    divided = replace(room, is_divided=True, num_jobs=1, memory_bytes_free=GB)
    joined = world.claim(room=divided, pack_key=large.pack_key)
    assert [claim.job.id for claim in joined] == [large.id]
    claims.end(world.db, joined[0].claim_id, reason=EndReason.DRAINED, detail="")
    whole = replace(divided, is_divided=False)
    assert [claim.job.id for claim in world.claim(room=whole, pack_key=large.pack_key)] == [small.id]


def whole_bytes(job: Job) -> int:
    return needs.demand(job, {}, recomputes=False).whole_bytes


def test_a_plan_tells_of_workers_that_would_divide_the_base(world: World) -> None:
    on(world, 2, 17)
    world.base("large", **LARGE)

    row = ready(world, model="large", precision="bfloat16")

    (worker,) = found(row)["devices"]["workers_that_fit"]
    assert (worker["num_devices"], worker["strategy"]) == (2, "fsdp2")
    *_, divided = found(row)["memory"]
    assert (divided["kind"], divided["num_devices"], divided["strategy"]) == ("cpu", 2, "fsdp2")
    parts = {part["part"]: part["bytes"] for part in divided["parts"]}
    assert (parts["undivided"], parts["base_share"], parts["gathered_blocks"]) == (2 * GB, 9 * GB, 27 * GB // 5)
    assert divided["total_bytes"] == sum(parts.values()) == worker["needed_bytes"]
    assert "fits_no_worker" not in codes(row)


def test_a_plan_of_a_job_that_needs_whole_weights_says_so(world: World) -> None:
    on(world, 2, 17)
    world.base("large", **LARGE)

    row = ready(world, model="large", precision="bfloat16", lora={"use_dora": True})

    (warning,) = [warning for warning in found(row)["warnings"] if warning["code"] == "fits_no_worker"]
    assert "DoRA reads the base's weights" in warning["message"]
    assert "one GPU of 24 GB" in warning["remedy"]
    assert all(memory["strategy"] == "replicated" for memory in found(row)["memory"])


def told_of(world: World, job: Job) -> Any:
    return explanation.explain(world.db, project_id=job.project_id, job_id=job.id)


def test_a_waiting_job_is_told_how_each_group_of_devices_would_hold_its_base(world: World) -> None:
    for worker_id, number, gigabytes in (("w1", 2, 17), ("w2", 2, 17), ("w3", 1, 21), ("w4", 1, 17)):
        register(world, group(number, gigabytes), worker_id=worker_id)
    job = queued_large(world)

    divided, whole = told_of(world, job)["placements"]

    assert (divided["strategy"], divided["num_devices"], divided["num_workers"]) == ("fsdp2", 2, 2)
    assert divided["blocks"] == {
        "count": 10,
        "bytes": 18 * GB,
        "share_bytes": 9 * GB,
        "gathered_bytes": 27 * GB // 5,
    }
    assert divided["memory_bytes"] == 17 * GB
    assert divided["needed_bytes"] == whole["needed_bytes"] - 18 * GB + 9 * GB + 27 * GB // 5
    assert divided["reason"].startswith("With the whole base the job would need about 20.")
    assert (whole["strategy"], whole["num_devices"], whole["blocks"]) == ("replicated", 1, None)


def test_a_job_that_needs_whole_weights_is_told_of_no_group_that_would_divide_them(world: World) -> None:
    register(world, group(2, 17), worker_id="w1")
    register(world, group(2, 17, "fsdp2"), worker_id="w2")

    assert told_of(world, queued_large(world, lora={"use_dora": True}))["placements"] == []


def test_a_running_job_is_told_how_its_base_is_held_whatever_it_was_asked(world: World) -> None:
    room = on(world, 2, 17)
    job = queued_large(world)
    world.claim(room=room)

    told = told_of(world, job)
    (placement,) = told["placements"]
    jobs.pause(world.db, project_id=job.project_id, job_id=job.id)

    assert (placement["strategy"], told["strategy"]) == ("fsdp2", "fsdp2")
    assert placement["reason"] in told["explanation"]
    assert told_of(world, job)["placements"] == [placement]
