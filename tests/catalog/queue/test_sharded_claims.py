"""Claims of a worker with several devices find the jobs that fit a sharded base model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.fleet import workers
from catalog.jobs import commands, explanation
from catalog.queue import claims
from catalog.resources import requirements
from catalog.resources.sharding import DeviceGroup, ShardingStrategy, Wanted
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason
from catalog.tables.jobs import Job
from tests.catalog.plan_data import ready
from tests.catalog.plans.test_plans import codes, found
from tests.catalog.read_costs import rows_read
from tests.catalog.world import World

BLOCKS = {"count": 10, "num_parameters": 9 * 10**9, "largest_parameters": 9 * 10**8}
LARGE: dict[str, Any] = {"num_parameters": 10**10, "blocks": BLOCKS}
"""A base model of 20 GB in bf16, of which 18 GB are blocks.

Sharded, each of two devices needs 2 + 9 + 3 · 1.8 = 16.4 GB, each of four 11.9 GB, and each of eight 9.65 GB.
"""
GB = 10**9


def group(number: int, gigabytes: float, wanted: Wanted = "auto") -> Capacity:
    held = int(gigabytes * GB)
    return Capacity(
        max_jobs=4, memory_bytes_free=held, group=DeviceGroup(num_devices=number, bytes_of_each=held, wanted=wanted)
    )


def on(world: World, number: int, gigabytes: float, wanted: Wanted = "auto") -> Capacity:
    """Register a worker with this capacity and return the capacity."""
    capacity = group(number, gigabytes, wanted)
    register(world, capacity)
    return capacity


def on_gpus(world: World, gigabytes: float, wanted: Wanted = "auto", *, host: float = 18) -> Capacity:
    """Register a worker with two GPUs, net of the CUDA and NCCL reserve.

    `host` is its memory for a base model in GB.
    """
    pair = DeviceGroup(kind="cuda", num_devices=2, bytes_of_each=0, wanted=wanted, host_bytes=int(host * GB))
    pair = replace(pair, bytes_of_each=int(gigabytes * GB) + pair.reserve_bytes)
    capacity = Capacity(max_jobs=4, memory_bytes_free=pair.bytes_of_each, recomputes=True, group=pair)
    register(world, capacity)
    return capacity


def register(world: World, capacity: Capacity, *, worker_id: str = "w1") -> None:
    group = capacity.group
    fields = {"num_processes": group.num_devices, "strategy": group.wanted, "host_bytes": group.host_bytes}
    devices = [{"kind": group.kind, **fields}]
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
def test_job_is_claimed_where_its_shard_fits(
    world: World, number: int, gigabytes: float, wanted: Wanted, is_taken: bool
) -> None:
    capacity = on(world, number, gigabytes, wanted)
    job = queued_large(world)

    assert [claim.job.id for claim in world.claim(capacity=capacity)] == ([job.id] if is_taken else [])


@pytest.mark.parametrize(
    ("gigabytes", "wanted", "host", "is_taken"),
    [
        # Sharded, the job needs 16.4 GB. With shards in host memory: 2 + 3 · 1.8 and half of the incoming block, 8.3
        # GB.
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
def test_job_is_claimed_where_the_host_holds_the_base(
    world: World, gigabytes: float, wanted: Wanted, host: float, is_taken: bool
) -> None:
    capacity = on_gpus(world, gigabytes, wanted, host=host)
    job = queued_large(world)

    assert [claim.job.id for claim in world.claim(capacity=capacity)] == ([job.id] if is_taken else [])


def test_explanation_of_a_job_that_exceeds_the_host_memory(world: World) -> None:
    on_gpus(world, 8.5, host=10)
    job = queued_large(world)

    reported = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "about 18.0 GB of host memory, of which a base model may use 10.0 GB." in reported
    assert "or on 2 GPUs with 12 GB each and 18.0 GB of host memory for the base model." in reported


def test_joiner_of_an_offloaded_base_would_also_be_offloaded_alone(world: World) -> None:
    small, large = queued_large(world), world.queued(model="large", precision="bfloat16", lora={"rank": 256})
    capacity = on_gpus(world, (sharded_bytes(large) - 1) / GB)
    ways = [capacity.group.strategy(requirements.demand(job, recomputes=True)) for job in (small, large)]
    assert ways == ["fsdp2", "fsdp2_offload"]

    def joined(holding: ShardingStrategy) -> list[str]:
        joining = replace(capacity, holding=holding, num_jobs=1, memory_bytes_free=GB)
        found = world.claim(capacity=joining, pack_key=large.pack_key)
        for claim in found:
            claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")
        return [claim.job.id for claim in found]

    assert joined("offloaded") == [large.id]
    assert joined("sharded") == [small.id]
    assert joined("replicated") == []


def sharded_bytes(job: Job) -> int:
    pair = DeviceGroup(kind="cuda", num_devices=2)
    return pair.allocated_bytes(requirements.demand(job, recomputes=True), "sharded")


def test_jobs_that_need_full_weights_do_not_hide_others(world: World) -> None:
    capacity = on(world, 2, 17)
    world.flood(queued_large(world, lora={"use_dora": True}), 40)
    plain = world.queued(model="large", precision="bfloat16")

    assert [claim.job.id for claim in world.claim(capacity=capacity)] == [plain.id]


def test_dora_job_waits_for_a_worker_that_fits_the_full_base(world: World) -> None:
    capacity = on(world, 2, 17)
    job = queued_large(world, lora={"use_dora": True})

    assert world.claim(capacity=capacity) == []
    reported = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "The job needs about 20.0 GB, but the largest worker has 17.0 GB. DoRA needs the full weights" in reported
    assert "It would fit on one GPU with 24 GB." in reported

    roomy = on(world, 2, 21)
    assert [claim.job.id for claim in world.claim(capacity=roomy)] == [job.id]


def test_always_sharding_worker_claims_no_job_that_needs_full_weights(world: World) -> None:
    capacity = on(world, 2, 100, "fsdp2")
    job = queued_large(world, lora={"init_lora_weights": "pissa"})

    assert world.claim(capacity=capacity) == []
    reported = explanation.explain(world.db, project_id=job.project_id, job_id=job.id)["explanation"]
    assert "always shards base models across its devices (LORRY_STRATEGY is fsdp2). pissa decomposes" in reported


def test_joiner_of_a_sharded_base_would_also_be_sharded_alone(world: World) -> None:
    small, large = queued_large(world), world.queued(model="large", precision="bfloat16", lora={"rank": 256})
    capacity = on(world, 2, (whole_bytes(large) - 1) / GB)
    assert whole_bytes(small) < capacity.memory_bytes_free

    sharded = replace(capacity, holding="sharded", num_jobs=1, memory_bytes_free=GB)
    joined = world.claim(capacity=sharded, pack_key=large.pack_key)
    assert [claim.job.id for claim in joined] == [large.id]
    claims.end(world.db, joined[0].claim_id, reason=EndReason.DRAINED, detail="")
    whole = replace(sharded, holding="replicated")
    assert [claim.job.id for claim in world.claim(capacity=whole, pack_key=large.pack_key)] == [small.id]


@pytest.mark.parametrize("wanted", ["auto", "fsdp2"])
def test_full_device_group_reads_little_of_a_long_queue(world: World, wanted: Wanted) -> None:
    first = queued_large(world)
    world.flood(first, 2000)
    full = on(world, 2, 1, wanted)
    loaded, live = (
        replace(full, resident_key=first.pack_key),
        replace(full, memory_bytes_when_empty=1, holding="sharded"),
    )
    queries_by_name = {
        "a new trainer": lambda: world.claim(capacity=full),
        "a trainer that is loaded": lambda: world.claim(capacity=loaded),
        "jobs that join": lambda: world.claim(capacity=replace(live, memory_bytes_free=1), pack_key=first.pack_key),
    }

    found = {name: rows_read(world.db, query) for name, query in queries_by_name.items()}

    assert {name: number for name, number in found.items() if number >= 1000} == {}
    assert world.job(first.id).state == "queued"


def whole_bytes(job: Job) -> int:
    return requirements.demand(job, recomputes=False).whole_bytes


def test_plan_lists_workers_that_would_shard_the_base(world: World) -> None:
    on(world, 2, 17)
    world.base("large", **LARGE)

    row = ready(world, model="large", precision="bfloat16")

    (worker,) = found(row)["devices"]["workers_that_fit"]
    assert (worker["num_devices"], worker["strategy"]) == (2, "fsdp2")
    *_, sharded = found(row)["memory"]
    assert (sharded["kind"], sharded["num_devices"], sharded["strategy"]) == ("cpu", 2, "fsdp2")
    parts = {part["part"]: part["bytes"] for part in sharded["parts"]}
    assert (parts["undivided"], parts["base_share"], parts["gathered_blocks"]) == (2 * GB, 9 * GB, 27 * GB // 5)
    assert sharded["total_bytes"] == sum(parts.values()) == worker["needed_bytes"]
    assert "fits_no_worker" not in codes(row)


def test_plan_of_a_job_that_needs_full_weights_warns(world: World) -> None:
    on(world, 2, 17)
    world.base("large", **LARGE)

    row = ready(world, model="large", precision="bfloat16", lora={"use_dora": True})

    (warning,) = [warning for warning in found(row)["warnings"] if warning["code"] == "fits_no_worker"]
    assert "DoRA needs the full weights" in warning["message"]
    assert "one GPU with 24 GB" in warning["remedy"]
    assert all(memory["strategy"] == "replicated" for memory in found(row)["memory"])


def explained(world: World, job: Job) -> Any:
    return explanation.explain(world.db, project_id=job.project_id, job_id=job.id)


def test_explanation_lists_placements_by_device_group(world: World) -> None:
    for worker_id, number, gigabytes in (("w1", 2, 17), ("w2", 2, 17), ("w3", 1, 21), ("w4", 1, 17)):
        register(world, group(number, gigabytes), worker_id=worker_id)
    job = queued_large(world)

    sharded, whole = explained(world, job)["placements"]

    assert (sharded["strategy"], sharded["num_devices"], sharded["num_workers"]) == ("fsdp2", 2, 2)
    assert sharded["blocks"] == {
        "count": 10,
        "bytes": 18 * GB,
        "share_bytes": 9 * GB,
        "gathered_bytes": 27 * GB // 5,
    }
    assert sharded["memory_bytes"] == 17 * GB
    assert sharded["needed_bytes"] == whole["needed_bytes"] - 18 * GB + 9 * GB + 27 * GB // 5
    assert sharded["reason"].startswith("A full replica of the base model would need about 20.")
    assert (whole["strategy"], whole["num_devices"], whole["blocks"]) == ("replicated", 1, None)


def test_placements_exclude_sharding_for_jobs_that_need_full_weights(world: World) -> None:
    register(world, group(2, 17), worker_id="w1")
    register(world, group(2, 17, "fsdp2"), worker_id="w2")

    assert explained(world, queued_large(world, lora={"use_dora": True}))["placements"] == []


def test_running_job_shows_its_actual_placement(world: World) -> None:
    capacity = on(world, 2, 17)
    job = queued_large(world)
    world.claim(capacity=capacity)

    reported = explained(world, job)
    (placement,) = reported["placements"]
    commands.pause(world.db, project_id=job.project_id, job_id=job.id)

    assert (placement["strategy"], reported["strategy"]) == ("fsdp2", "fsdp2")
    assert placement["reason"] in reported["explanation"]
    assert explained(world, job)["placements"] == [placement]


def test_plan_lists_workers_that_would_offload_the_base(world: World) -> None:
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


def test_plan_of_a_job_that_exceeds_the_host_memory_warns(world: World) -> None:
    on_gpus(world, 8.5, host=10)
    world.base("large", **LARGE)

    (warning,) = [
        warning
        for warning in found(ready(world, model="large", precision="bfloat16"))["warnings"]
        if warning["code"] == "fits_no_worker"
    ]
    assert "about 18.0 GB of host memory, of which a base model may use 10.0 GB." in warning["message"]
    assert "and 18.0 GB of host memory for the base model." in warning["remedy"]


def test_explanation_lists_an_offloading_group(world: World) -> None:
    on_gpus(world, 8.5)

    (placement,) = explained(world, queued_large(world))["placements"]

    assert (placement["strategy"], placement["kind"]) == ("fsdp2_offload", "cuda")
    blocks = placement["blocks"]
    assert (blocks["bytes"], blocks["share_bytes"], blocks["gathered_bytes"]) == (18 * GB, 9 * GB, 63 * GB // 10)
    assert "with shards in host memory (about 18.0 GB in total) needs about" in placement["reason"]
