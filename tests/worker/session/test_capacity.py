"""What a worker of several devices has free, and how its trainers hold a base."""

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
from catalog.history import queries
from catalog.resources import memory, requirements
from catalog.resources.sharding import DeviceGroup, host_bytes, reported_group
from catalog.settings import Settings
from catalog.tables.fleet import Worker
from tests.catalog.world import DESCRIPTION
from tests.worker.pack_site import OUTAGE, READY, PackSite, say, tell
from worker.context.context import check_strategy, open_worker
from worker.node import devices as node
from worker.protocol.mailbox import TrainerDirectory
from worker.session.capacity import capacity_report, free_capacity
from worker.session.sharding import reason_for, strategy_for
from worker.session.trainer_session import TrainerSession

BLOCKS = {"blocks": {"count": 2, "num_parameters": 8000, "largest_parameters": 1000}}
"""Of the 20,000 bytes of the world's base in bf16, 16,000 are blocks."""


@pytest.fixture
def divided(site: PackSite) -> PackSite:
    """A worker of two processes that divides every base."""
    site.context.settings = site.settings.model_copy(update={"cpu_processes": 2, "strategy": "fsdp2"})
    site.world.base("blocks", **BLOCKS)
    return site


def loading(site: PackSite, strategy: Any, *, pack_key: str = "b:bfloat16:causal-lm") -> TrainerSession:
    directory = TrainerDirectory.create(site.context.trainers_dir() / f"trainer-{strategy}", {})
    description = DESCRIPTION | BLOCKS
    return TrainerSession(site.context, "trainer-9", directory, pack_key, description=description, strategy=strategy)


def test_a_trainer_of_a_divided_base_is_reckoned_to_take_a_share_of_it(divided: PackSite) -> None:
    whole, half = loading(divided, "replicated").bytes_to_come(), loading(divided, "fsdp2").bytes_to_come()

    assert whole == memory.trainer_bytes(DESCRIPTION, "bfloat16")
    assert half == whole - 16_000 + 8_000 + 3 * 2_000


def test_of_a_base_in_the_hosts_memory_a_trainer_is_reckoned_to_take_no_share_of_a_gpus(
    divided: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided.context.device = replace(
        divided.context.device, kind="cuda", indices=(0, 1), memory_bytes=2 * 10**11, host_memory_bytes=10**11
    )
    monkeypatch.setattr(node, "free_bytes", lambda _: 10**11)
    session = loading(divided, "fsdp2_offload")
    left = memory.trainer_bytes(DESCRIPTION, "bfloat16") - 16_000

    # Three blocks of 2,000 bytes, and the half of the next one that comes.
    assert session.bytes_to_come() - divided.context.group.reserve_bytes == left + 6_000 + 1_000
    assert (session.holding, divided.context.host_bytes) == ("offloaded", host_bytes(10**11, num_processes=2))
    divided.context.settings = divided.context.settings.model_copy(update={"cpu_offload_bytes": 5})
    assert divided.context.group.host_bytes == 5


def test_of_several_gpus_what_they_talk_through_is_set_aside_until_it_is_taken(
    divided: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = replace(divided.context.device, kind="cuda", indices=(0, 1), memory_bytes=2 * 10**11)
    divided.context.device = gpus
    monkeypatch.setattr(node, "free_bytes", lambda _: 10**11)
    reserve = divided.context.group.reserve_bytes
    session = loading(divided, "fsdp2")
    to_come = session.bytes_to_come()

    assert to_come - reserve == memory.trainer_bytes(DESCRIPTION, "bfloat16") - 2_000
    assert free_capacity(divided.context, session).memory_bytes_free == 10**11 - to_come
    say(session, READY | {"memory": {"base_bytes": 12_000}})
    session.read_events()
    capacity = free_capacity(divided.context, session)
    assert capacity.memory_bytes_free == 10**11 + 12_000 + reserve, "who comes next counts both again"
    assert capacity_report(capacity) == {
        "max_jobs": 4,
        "memory_bytes_free": capacity.memory_bytes_free,
        "holding": "sharded",
    }


def test_a_trainer_that_is_empty_is_no_trainer_for_a_job_whose_base_is_held_otherwise(divided: PackSite) -> None:
    claim = divided.claim(model="blocks")
    is_for = {
        strategy: loading(divided, strategy, pack_key=claim.job.pack_key).is_for(claim.job)
        for strategy in ("replicated", "fsdp2")
    }

    assert is_for == {"replicated": False, "fsdp2": True}


def test_how_the_base_is_held_is_told_when_a_job_is_admitted_among_several(divided: PackSite) -> None:
    claim = divided.claim(model="blocks")
    divided.session(claim)

    job = claim.job
    told = queries.events_since(divided.db, project_id=job.project_id, job_id=job.id, seq=0)
    (event,) = [event for event in told if event.message.startswith("Strategy")]
    assert event.message == f"Strategy fsdp2. {reason_for(divided.context, job)}"
    assert event.data == {"strategy": "fsdp2", "num_devices": 2}


@pytest.mark.parametrize("failing", range(4))
def test_whichever_write_fails_a_job_is_told_once_that_it_has_started(
    divided: PackSite, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    claim = divided.claim(model="blocks")
    session, write, numbers = divided.loading_session(claim), Database.write, itertools.count()
    say(session, READY)
    tell(session, claim, "admitted", step=0, num_steps=10, num_parameters=1, steps_per_epoch=2.5)

    def fails_once(db: Database) -> Any:
        if next(numbers) == failing:
            raise OUTAGE
        return write(db)

    monkeypatch.setattr(Database, "write", fails_once)
    for _ in range(3):
        with suppress(Unavailable):
            session.read_events()

    job = claim.job
    told = queries.events_since(divided.db, project_id=job.project_id, job_id=job.id, seq=0)
    begun = [event.message.partition(".")[0] for event in told if event.type == "message"]
    assert begun[-2:] == ["Fine-tuning job started", "Strategy fsdp2"]
    assert begun.count("Fine-tuning job started") == 1


def test_one_device_says_nothing_of_it(site: PackSite) -> None:
    claim = site.claim()
    site.session(claim)

    job = claim.job
    told = queries.events_since(site.db, project_id=job.project_id, job_id=job.id, seq=0)
    assert not [event for event in told if event.message.startswith("Strategy")]
    assert strategy_for(site.context, job) == "replicated"


def test_by_itself_a_worker_divides_what_does_not_fit_its_smallest_device(divided: PackSite) -> None:
    job = divided.queued(model="blocks")
    need = requirements.demand(job, {}, recomputes=False).whole_bytes
    settings = divided.settings.model_copy(update={"cpu_processes": 2})
    divided.context.settings = settings

    def on(bytes_of_each: int) -> str:
        divided.context.device = replace(divided.context.device, memory_bytes=2 * bytes_of_each)
        return strategy_for(divided.context, job)

    assert (on(need), on(need - 1)) == ("replicated", "fsdp2")


def test_what_a_worker_registers_tells_how_it_holds_bases(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, cpu_processes=2, strategy="fsdp2", standby_trainer=False)
    device = replace(node.cpu(), memory_bytes=1000)
    Database(settings.resolved_database_url()).migrate()
    with open_worker(settings, device=device) as context, context.db.read() as session:
        row = session.get_one(Worker, context.worker_id)
        assert reported_group(row.devices, row.memory_bytes) == context.group
        assert context.group == DeviceGroup(num_devices=2, bytes_of_each=500, wanted="fsdp2")


def test_a_worker_that_is_to_use_deepspeed_and_has_none_does_not_start() -> None:
    check_strategy("fsdp2")
    if find_spec("deepspeed") is None:
        with pytest.raises(SystemExit, match="requires DeepSpeed"):
            check_strategy("zero3")
        with pytest.raises(SystemExit, match="set LORRY_STRATEGY to fsdp2_offload"):
            check_strategy("zero3_offload")


def test_a_worker_of_a_gang_that_is_to_divide_bases_does_not_start() -> None:
    check_strategy("auto", gang="hall")
    check_strategy("replicated", gang="hall")
    with pytest.raises(SystemExit, match="a gang \\(hall\\) can't shard a base model"):
        check_strategy("fsdp2", gang="hall")
