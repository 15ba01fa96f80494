"""Free capacity of a worker with several devices, and the placement of base models by its trainers."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.resources import requirements
from catalog.resources.memory import BaseModelMemory, ElementwiseKernels
from catalog.resources.sharding import DeviceGroup, host_bytes, reported_group
from catalog.settings import Settings
from catalog.tables.fleet import Worker
from tests.catalog.world import DESCRIPTION
from tests.worker.pack_site import OUTAGE, READY, PackSite, emit, emit_for
from worker.context.context import check_strategy, open_worker
from worker.next_work import capacity_report, free_capacity
from worker.node import devices as node
from worker.protocol.mailbox import TrainerDirectory
from worker.session.base_load import reason_for, strategy_for
from worker.session.trainer_session import TrainerSession

BLOCKS = {"blocks": {"count": 2, "num_parameters": 8000, "largest_parameters": 1000}}
"""Blocks take 16,000 of the 20,000 bytes of the world's base model in bf16."""
GATED_MLP = {"gate_proj": [[96, 32], 2], "up_proj": [[96, 32], 2], "down_proj": [[32, 96], 2]}


@pytest.fixture
def sharded_site(site: PackSite) -> PackSite:
    """Return a site whose worker has two processes and shards every base model."""
    site.context.settings = site.settings.model_copy(update={"cpu_processes": 2, "strategy": "fsdp2"})
    site.world.base("blocks", **BLOCKS)
    return site


def loading(site: PackSite, strategy: Any, *, pack_key: str = "b:bfloat16:causal-lm") -> TrainerSession:
    directory = TrainerDirectory.create(site.context.trainers_dir() / f"trainer-{strategy}", {})
    description = DESCRIPTION | BLOCKS
    return TrainerSession(site.context, "trainer-9", directory, pack_key, description=description, strategy=strategy)


def test_a_trainer_of_a_sharded_base_is_predicted_to_take_one_shard(sharded_site: PackSite) -> None:
    replicated, sharded = (
        loading(sharded_site, "replicated").memory.to_come(),
        loading(sharded_site, "fsdp2").memory.to_come(),
    )

    assert replicated == BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes()
    assert sharded == replicated - 16_000 + 8_000 + 3 * 2_000


def test_a_trainer_of_an_offloaded_base_is_predicted_to_keep_no_shard_on_gpu(
    sharded_site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded_site.context.device = replace(
        sharded_site.context.device, kind="cuda", indices=(0, 1), memory_bytes=2 * 10**11, host_memory_bytes=10**11
    )
    monkeypatch.setattr(node, "free_bytes", lambda _: 10**11)
    session = loading(sharded_site, "fsdp2_offload")
    left = BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes() - 16_000

    # Three blocks of 2,000 bytes, and the half of the next block that is transferred.
    assert session.memory.to_come() - sharded_site.context.group.reserve_bytes == left + 6_000 + 1_000
    assert (session.holding, sharded_site.context.host_bytes) == ("offloaded", host_bytes(10**11, num_processes=2))
    sharded_site.context.settings = sharded_site.context.settings.model_copy(update={"cpu_offload_bytes": 5})
    assert sharded_site.context.group.host_bytes == 5


def test_communication_buffers_of_several_gpus_are_reserved_until_allocated(
    sharded_site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = replace(sharded_site.context.device, kind="cuda", indices=(0, 1), memory_bytes=2 * 10**11)
    sharded_site.context.device = gpus
    monkeypatch.setattr(node, "free_bytes", lambda _: 10**11)
    reserve = sharded_site.context.group.reserve_bytes
    session = loading(sharded_site, "fsdp2")
    to_come = session.memory.to_come()

    assert to_come - reserve == BaseModelMemory(DESCRIPTION, "bfloat16").trainer_bytes() - 2_000
    assert free_capacity(sharded_site.context, session).memory_bytes_free == 10**11 - to_come
    emit(session, READY | {"memory": {"base_bytes": 12_000}})
    session.read_events()
    capacity = free_capacity(sharded_site.context, session)
    assert capacity.memory_bytes_free == 10**11 + 12_000 + reserve, "the next trainer counts both again"
    assert capacity_report(capacity) == {
        "max_jobs": 4,
        "memory_bytes_free": capacity.memory_bytes_free,
        "holding": "sharded",
    }


def test_an_empty_trainer_takes_no_job_that_needs_another_strategy(sharded_site: PackSite) -> None:
    claim = sharded_site.claim(model="blocks")
    is_for = {
        strategy: loading(sharded_site, strategy, pack_key=claim.job.pack_key).is_for(claim.job)
        for strategy in ("replicated", "fsdp2")
    }

    assert is_for == {"replicated": False, "fsdp2": True}


def test_the_strategy_is_recorded_when_a_job_is_admitted(sharded_site: PackSite) -> None:
    claim = sharded_site.claim(model="blocks")
    sharded_site.session(claim)

    job = claim.job
    events = sharded_site.world.events(job.id)
    (event,) = [event for event in events if event.message.startswith("Strategy")]
    assert event.message == f"Strategy fsdp2. {reason_for(sharded_site.context, job)}"
    assert event.data == {"strategy": "fsdp2", "num_devices": 2}


@pytest.mark.parametrize("failing", range(4))
def test_the_start_of_a_job_is_recorded_once_whichever_write_fails(
    sharded_site: PackSite, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    claim = sharded_site.claim(model="blocks")
    session, write, numbers = sharded_site.loading_session(claim), Database.write, itertools.count()
    emit(session, READY)
    emit_for(session, claim, "admitted", step=0, num_steps=10, num_parameters=1, steps_per_epoch=2.5)

    def fails_once(db: Database) -> Any:
        if next(numbers) == failing:
            raise OUTAGE
        return write(db)

    monkeypatch.setattr(Database, "write", fails_once)
    for _ in range(3):
        with suppress(Unavailable):
            session.read_events()

    job = claim.job
    events = sharded_site.world.events(job.id)
    begun = [event.message.partition(".")[0] for event in events if event.type == "message"]
    assert begun[-2:] == ["Fine-tuning job started", "Strategy fsdp2"]
    assert begun.count("Fine-tuning job started") == 1


def test_no_strategy_is_recorded_for_one_device(site: PackSite) -> None:
    claim = site.claim()
    site.session(claim)

    job = claim.job
    events = site.world.events(job.id)
    assert not [event for event in events if event.message.startswith("Strategy")]
    assert strategy_for(site.context, job) == "replicated"


def test_by_default_a_worker_shards_a_base_that_does_not_fit_a_device(sharded_site: PackSite) -> None:
    job = sharded_site.queued(model="blocks")
    need = requirements.demand(job, recomputes=False).whole_bytes
    settings = sharded_site.settings.model_copy(update={"cpu_processes": 2})
    sharded_site.context.settings = settings

    def on(bytes_of_each: int) -> str:
        sharded_site.context.device = replace(sharded_site.context.device, memory_bytes=2 * bytes_of_each)
        return strategy_for(sharded_site.context, job)

    assert (on(need), on(need - 1)) == ("replicated", "fsdp2")


def test_a_registered_worker_reports_its_device_group(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, cpu_processes=2, strategy="fsdp2", standby_trainer=False)
    device = replace(node.cpu(), memory_bytes=1000)
    Database(settings.resolved_database_url()).migrate()
    with open_worker(settings, device=device) as context, context.db.read() as session:
        row = session.get_one(Worker, context.worker_id)
        assert reported_group(row.devices, row.memory_bytes) == context.group
        assert context.group == DeviceGroup(num_devices=2, bytes_of_each=500, wanted="fsdp2")


def test_a_worker_with_a_zero3_strategy_and_no_deepspeed_does_not_start() -> None:
    check_strategy("fsdp2")
    if find_spec("deepspeed") is None:
        with pytest.raises(SystemExit, match="requires DeepSpeed"):
            check_strategy("zero3")
        with pytest.raises(SystemExit, match="set LORRY_STRATEGY to fsdp2_offload"):
            check_strategy("zero3_offload")


def test_a_gang_worker_with_a_sharding_strategy_does_not_start() -> None:
    check_strategy("auto", gang="hall")
    check_strategy("replicated", gang="hall")
    with pytest.raises(SystemExit, match="a gang \\(hall\\) can't shard a base model"):
        check_strategy("fsdp2", gang="hall")


@pytest.mark.parametrize("kernels", ["cuda", "torch"])
def test_ticks_of_a_ready_trainer_are_estimated_for_its_own_kernels(
    site: PackSite, monkeypatch: pytest.MonkeyPatch, kernels: ElementwiseKernels
) -> None:
    site.context.device = replace(site.context.device, kind="cuda")
    monkeypatch.setattr(node, "free_bytes", lambda _: 10**9)
    claim = site.claim()
    session = site.loading_session(claim)
    description = DESCRIPTION | {"linear_shapes": DESCRIPTION["linear_shapes"] | GATED_MLP}
    base = session.memory._base = BaseModelMemory(description, "bfloat16")
    products = requirements.own_parts(claim.job, base, recomputes=True)["lora_products"]
    assert products > 0
    job_bytes = 26 * claim.job.adapter_parameters + products
    of_cpu, own = (replace(base, kernels=named).slice_bytes() for named in ("cpu", kernels))
    assert free_capacity(site.context, session).slice_bytes == of_cpu
    assert of_cpu != own

    emit(session, READY | {"elementwise_kernels": kernels})
    session.read_events()

    assert free_capacity(site.context, session).slice_bytes == own
    trainer_bytes = replace(base, kernels=kernels).trainer_bytes()
    assert session.memory.to_come() == trainer_bytes - 1 + job_bytes, "READY reports a base of one byte"
    emit_for(session, claim, "admitted", step=0, num_steps=10, num_parameters=1, steps_per_epoch=2.5)
    session.read_events()
    logits = base.tick_bytes(0)
    session.memory.report = {"cached_bytes": 10**8}
    assert session.memory.spare() == 10**8 - logits - own - products
