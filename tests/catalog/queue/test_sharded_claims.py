"""Claims of a worker with several devices find what fits a divided base, on both databases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.fleet import workers
from catalog.jobs import commands, explanation
from catalog.queue import claims
from catalog.registry import base_models
from catalog.resources import requirements
from catalog.resources.sharding import DeviceGroup, ShardingStrategy, Wanted
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason
from catalog.tables.jobs import Job
from tests.catalog.plan_data import ready
from tests.catalog.plans.test_plans import codes, found
from tests.catalog.reading import rows_read
from tests.catalog.world import World, sha

BLOCKS = {"count": 10, "num_parameters": 9 * 10**9, "largest_parameters": 9 * 10**8}
LARGE: dict[str, Any] = {"num_parameters": 10**10, "blocks": BLOCKS}
"""20 GB in bf16, 18 of them blocks. Each of two devices needs 2 + 9 + 3 · 1.8 = 16.4 GB, each of four 11.9, and of
eight 9.65."""
GB = 10**9


def group(number: int, gigabytes: float, wanted: Wanted = "auto") -> Capacity:
    held = int(gigabytes * GB)
    return Capacity(
        max_jobs=4, memory_bytes_free=held, group=DeviceGroup(num_devices=number, bytes_of_each=held, wanted=wanted)
    )


def on(world: World, number: int, gigabytes: float, wanted: Wanted = "auto") -> Capacity:
    """The room of a worker that has registered so."""
    capacity = group(number, gigabytes, wanted)
    register(world, capacity)
    return capacity


def on_gpus(world: World, gigabytes: float, wanted: Wanted = "auto", *, host: float = 18) -> Capacity:
    """Of a worker with two, beside what CUDA and NCCL take of each. host: gigabytes of its memory for a base."""
    pair = DeviceGroup(kind="cuda", num_devices=2, bytes_of_each=0, wanted=wanted, host_bytes=int(host * GB))
    pair = replace(pair, bytes_of_each=int(gigabytes * GB) + pair.reserve_bytes)
    capacity = Capacity(max_jobs=4, memory_bytes_free=pair.bytes_of_each, recomputes=True, group=pair)
    register(world, capacity)
    return capacity


def register(world: World, capacity: Capacity, *, worker_id: str = "w1") -> None:
    group = capacity.group
    said = {"num_processes": group.num_devices, "strategy": group.wanted, "host_bytes": group.host_bytes}
    devices = [{"kind": group.kind, **said}]
    about: dict[str, Any] = {"host": "here", "pid": 1, "devices": devices, "version": "1"}
    workers.register_worker(world.db, worker_id=worker_id, memory_bytes=capacity.memory_bytes_free, **about)


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
    capacity = on(world, number, gigabytes, wanted)
    job = queued_large(world)

    assert [claim.job.id for claim in world.claim(capacity=capacity)] == ([job.id] if is_taken else [])


@pytest.mark.parametrize(
    ("gigabytes", "wanted", "host", "is_taken"),
    [
        # Divided 16.4 GB; from the host 2 + 3 · 1.8, and the half of a block that comes: 8.3 GB.
        (8.5, "auto", 18, True),
        (8.5, "auto", 17.9, False),
        (8, "auto", 18, False),
        (17, "auto", 0, True),
        (8.5, "fsdp2", 18, False),
        (8.5, "zero3_offload", 18, True),
        (30, "fsdp2_offload", 18, True),
        (30, "fsdp2_offload", 17.9, False),
    ],
)
def test_a_job_is_taken_where_the_host_holds_the_base(
    world: World, gigabytes: float, wanted: Wanted, host: float, is_taken: bool
) -> None:
    capacity = on_gpus(world, gigabytes, wanted, host=host)
    job = queued_large(world)

    assert [claim.job.id for claim in world.claim(capacity=capacity)] == ([job.id] if is_taken else [])


def test_a_job_that_the_host_has_no_room_for_waits_with_a_sentence(world: World) -> None:
    on_gpus(world, 8.5, host=10)
    job = queued_large(world)

    told = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "about 18.0 GB of host memory, of which a base model may use 10.0 GB." in told
    assert "or on 2 GPUs with 12 GB each and 18.0 GB of host memory for the base model." in told


def test_who_joins_an_offloaded_base_would_have_it_so_alone(world: World) -> None:
    small, large = queued_large(world), world.queued(model="large", precision="bfloat16", lora={"rank": 256})
    capacity = on_gpus(world, (divided_bytes(large) - 1) / GB)
    ways = [capacity.group.strategy(requirements.demand(job, {}, recomputes=True)) for job in (small, large)]
    assert ways == ["fsdp2", "fsdp2_offload"]

    def joined(holding: ShardingStrategy) -> list[str]:
        beside = replace(capacity, holding=holding, num_jobs=1, memory_bytes_free=GB)
        found = world.claim(capacity=beside, pack_key=large.pack_key)
        for claim in found:
            claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
        return [claim.job.id for claim in found]

    assert joined("offloaded") == [large.id]
    assert joined("sharded") == [small.id]
    assert joined("replicated") == []


def divided_bytes(job: Job) -> int:
    pair = DeviceGroup(kind="cuda", num_devices=2)
    return pair.allocated_bytes(requirements.demand(job, {}, recomputes=True), "sharded")


def test_many_that_fit_nowhere_whole_hide_nobody(world: World) -> None:
    capacity = on(world, 2, 17)
    world.flood(queued_large(world, lora={"use_dora": True}), 40)
    plain = world.queued(model="large", precision="bfloat16")

    assert [claim.job.id for claim in world.claim(capacity=capacity)] == [plain.id]


def test_a_job_with_dora_waits_with_a_sentence_and_is_taken_where_the_whole_base_fits(world: World) -> None:
    capacity = on(world, 2, 17)
    job = queued_large(world, lora={"use_dora": True})

    assert world.claim(capacity=capacity) == []
    told = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "The job needs about 20.0 GB, but the largest worker has 17.0 GB. DoRA needs the full weights" in told
    assert "It would fit on one GPU with 24 GB." in told

    roomy = on(world, 2, 21)
    assert [claim.job.id for claim in world.claim(capacity=roomy)] == [job.id]


def test_a_worker_that_divides_every_base_takes_no_job_that_needs_whole_weights(world: World) -> None:
    capacity = on(world, 2, 100, "fsdp2")
    job = queued_large(world, lora={"init_lora_weights": "pissa"})

    assert world.claim(capacity=capacity) == []
    told = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "always shards base models across its devices (LORRY_STRATEGY is fsdp2). pissa decomposes" in told


def test_who_joins_a_divided_base_would_have_it_divided_alone(world: World) -> None:
    small, large = queued_large(world), world.queued(model="large", precision="bfloat16", lora={"rank": 256})
    capacity = on(world, 2, (whole_bytes(large) - 1) / GB)
    assert whole_bytes(small) < capacity.memory_bytes_free

    divided = replace(capacity, holding="sharded", num_jobs=1, memory_bytes_free=GB)
    joined = world.claim(capacity=divided, pack_key=large.pack_key)
    assert [claim.job.id for claim in joined] == [large.id]
    claims.end(world.db, joined[0].claim_id, reason=EndReason.DRAINED, detail="")
    whole = replace(divided, holding="replicated")
    assert [claim.job.id for claim in world.claim(capacity=whole, pack_key=large.pack_key)] == [small.id]


@pytest.mark.parametrize("wanted", ["auto", "fsdp2"])
def test_a_group_that_is_full_reads_little_of_a_long_queue_of_what_does_not_fit(world: World, wanted: Wanted) -> None:
    first = queued_large(world)
    world.flood(first, 2000)
    full = on(world, 2, 1, wanted)
    loaded, live = (
        replace(full, resident_key=first.pack_key),
        replace(full, memory_bytes_when_empty=1, holding="sharded"),
    )
    looks = {
        "a new trainer": lambda: world.claim(capacity=full),
        "a trainer that is loaded": lambda: world.claim(capacity=loaded),
        "jobs that join": lambda: world.claim(capacity=replace(live, memory_bytes_free=1), pack_key=first.pack_key),
    }

    found = {name: rows_read(world.db, look) for name, look in looks.items()}

    assert {name: number for name, number in found.items() if number >= 1000} == {}
    assert world.job(first.id).state == "queued"


def test_what_was_prepared_before_shares_were_reckoned_is_divided_all_the_same(world: World) -> None:
    job = queued_large(world)
    held = (job.shardable_bytes, job.gathered_bytes, job.least_divided_bytes)
    with world.db.write() as session:
        row = session.get_one(Job, job.id)
        row.shardable_bytes = row.gathered_bytes = row.least_divided_bytes = 0
    capacity = on(world, 2, 17, "fsdp2")

    (claim,) = world.claim(capacity=capacity)
    assert capacity.group.holding(requirements.demand(claim.job, LARGE, recomputes=False)) == "sharded"
    assert requirements.demand(claim.job, LARGE, recomputes=False).shardable_bytes == held[0] > 0
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")

    assert (requirements.note_all(world.db), requirements.note_all(world.db)) == (1, 0)
    again = world.job(job.id)
    assert (again.shardable_bytes, again.gathered_bytes, again.least_divided_bytes) == held


def test_a_base_whose_blocks_are_counted_later_is_divided_from_then_on(world: World) -> None:
    digest = sha(world.base("large", num_parameters=10**10))
    running = world.queued(model="large", precision="bfloat16")
    world.claim()
    waiting = world.queued(model="large", precision="bfloat16")
    capacity = on(world, 2, 17, "fsdp2")
    assert world.claim(capacity=capacity) == []
    told = explanation.explain(world.db, project_id=waiting.project_id, job_id=waiting.id)["explanation"]
    assert "The base model can't be sharded until a worker that has its files has counted its blocks" in told

    assert [row.name for row in base_models.uncounted(world.db)] == ["large", "smol"]
    assert not base_models.note_blocks(world.db, "large", digest="another", blocks=BLOCKS)
    assert base_models.note_blocks(world.db, "large", digest=digest, blocks=BLOCKS)
    assert not base_models.note_blocks(world.db, "large", digest=digest, blocks={"count": 1})

    assert [row.name for row in base_models.uncounted(world.db)] == ["smol"]
    assert [claim.job.id for claim in world.claim(capacity=capacity)] == [waiting.id]
    assert world.job(running.id).shardable_bytes == 18 * GB


def whole_bytes(job: Job) -> int:
    return requirements.demand(job, {}, recomputes=False).whole_bytes


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
    assert "DoRA needs the full weights" in warning["message"]
    assert "one GPU with 24 GB" in warning["remedy"]
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
    assert divided["reason"].startswith("A full replica of the base model would need about 20.")
    assert (whole["strategy"], whole["num_devices"], whole["blocks"]) == ("replicated", 1, None)


def test_a_job_that_needs_whole_weights_is_told_of_no_group_that_would_divide_them(world: World) -> None:
    register(world, group(2, 17), worker_id="w1")
    register(world, group(2, 17, "fsdp2"), worker_id="w2")

    assert told_of(world, queued_large(world, lora={"use_dora": True}))["placements"] == []


def test_a_running_job_is_told_how_its_base_is_held_whatever_it_was_asked(world: World) -> None:
    capacity = on(world, 2, 17)
    job = queued_large(world)
    world.claim(capacity=capacity)

    told = told_of(world, job)
    (placement,) = told["placements"]
    commands.pause(world.db, project_id=job.project_id, job_id=job.id)

    assert (placement["strategy"], told["strategy"]) == ("fsdp2", "fsdp2")
    assert placement["reason"] in told["explanation"]
    assert told_of(world, job)["placements"] == [placement]


def test_a_plan_tells_of_workers_that_would_keep_the_base_in_the_hosts_memory(world: World) -> None:
    on_gpus(world, 8.5)
    world.base("large", **LARGE)

    row = ready(world, model="large", precision="bfloat16")

    (worker,) = found(row)["devices"]["workers_that_fit"]
    assert (worker["num_devices"], worker["strategy"]) == (2, "fsdp2_offload")
    *_, offloaded = found(row)["memory"]
    assert (offloaded["kind"], offloaded["strategy"], offloaded["host_bytes"]) == ("cuda", "fsdp2_offload", 18 * GB)
    parts = {part["part"]: part["bytes"] for part in offloaded["parts"]}
    assert (parts["undivided"], parts["coming_share"], parts["gathered_blocks"]) == (2 * GB, 9 * GB // 10, 27 * GB // 5)
    assert "base_share" not in parts
    assert offloaded["total_bytes"] == sum(parts.values()) == worker["needed_bytes"]
    assert found(row)["devices"]["groups"][-1]["host_bytes"] == 18 * GB


def test_a_plan_of_a_job_that_the_host_has_no_room_for_says_so(world: World) -> None:
    on_gpus(world, 8.5, host=10)
    world.base("large", **LARGE)

    (warning,) = [
        warning
        for warning in found(ready(world, model="large", precision="bfloat16"))["warnings"]
        if warning["code"] == "fits_no_worker"
    ]
    assert "about 18.0 GB of host memory, of which a base model may use 10.0 GB." in warning["message"]
    assert "and 18.0 GB of host memory for the base model." in warning["remedy"]


def test_a_waiting_job_is_told_of_a_group_whose_host_would_hold_its_base(world: World) -> None:
    on_gpus(world, 8.5)

    (placement,) = told_of(world, queued_large(world))["placements"]

    assert (placement["strategy"], placement["kind"]) == ("fsdp2_offload", "cuda")
    blocks = placement["blocks"]
    assert (blocks["bytes"], blocks["share_bytes"], blocks["gathered_bytes"]) == (18 * GB, 9 * GB, 63 * GB // 10)
    assert "with shards in host memory (about 18.0 GB in total) needs about" in placement["reason"]
