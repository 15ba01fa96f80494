"""The page of workers, and the placement of base models on device groups, for jobs and workers."""

from __future__ import annotations

from playwright.sync_api import Locator, expect

from catalog.fleet import cordons, workers
from catalog.registry import base_models
from catalog.tables.jobs import Job
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_worker_shows_its_base_model_and_jobs(filled: Service, visit: Visit) -> None:
    seed.beat(filled.seeded)
    visitor = visit(filled)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    worker.get_by_role("link", name="titles-r32").wait_for()
    assert "smollm2-135m" in worker.inner_text()
    assert "3 adapters training" in worker.inner_text()


def test_worker_without_jobs_is_idle_and_shows_no_speed(fresh: Service, visit: Visit) -> None:
    seed.beat(fresh.seeded)
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    worker.get_by_text("idle, base model loaded").wait_for()
    assert "Tokens per second" not in worker.inner_text()


def test_worker_that_trains_for_another_project_shows_training(fresh: Service, visit: Visit) -> None:
    seeded = fresh.seeded
    others = seed.another_project(seeded)
    seed.submit(others, "theirs")
    seed.prepare(others)
    seed.claim(others)
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    worker.get_by_text("training", exact=True).wait_for()
    worker.get_by_text("Tokens per second").wait_for()


def test_operator_cordons_and_uncordons_a_worker(fresh: Service, visit: Visit) -> None:
    seed.beat(fresh.seeded)
    visitor = visit(fresh)
    visitor.open("#/workers")
    worker = visitor.page.get_by_role("region", name="bay-1")

    worker.get_by_role("button", name="Cordon").click()
    visitor.page.get_by_role("button", name="Cordon the worker").click()

    worker.get_by_text("idle, base model loaded, cordoned").wait_for()
    worker.get_by_text("the worker finishes its jobs and accepts no new ones").wait_for()
    worker.get_by_role("button", name="Uncordon").click()
    visitor.page.get_by_role("button", name="Uncordon the worker").click()
    worker.get_by_text("idle, base model loaded", exact=True).wait_for()


def test_cordoned_worker_shows_the_reason(fresh: Service, visit: Visit) -> None:
    seed.beat(fresh.seeded)
    cordons.cordon(fresh.seeded.db, seed.WORKER, reason="Its fan is loud.")
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    worker.get_by_text("accepts no new ones. Its fan is loud.").wait_for()


EACH = 2_900_000_000
"""Memory of each of four GPUs: enough for the sharded base model, too little for a replica, CUDA and NCCL."""


def queued(service: Service, suffix: str) -> Job:
    job = seed.submit(service.seeded, suffix)
    seed.prepare(service.seeded)
    return job


def fact(within: Locator, name: str) -> Locator:
    """Return the value of a named fact."""
    return within.get_by_role("definition").and_(within.locator(f"dt:text-is('{name}') + dd"))


def test_running_job_shows_how_and_why_its_base_model_is_sharded(fresh: Service, visit: Visit) -> None:
    seed.register(fresh.seeded.db, seed.gpus(4, bytes_of_each=EACH), bytes_of_each=EACH)
    job = queued(fresh, "sharded")
    seed.claim(fresh.seeded)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    panel = visitor.page.get_by_role("region", name="Base model placement")
    expect(fact(panel, "Base model")).to_have_text("sharded across 4 GPUs (FSDP2)")
    expect(fact(panel, "Why")).to_contain_text("the smallest of 4 devices has 2.9 GB")
    expect(fact(panel, "Blocks")).to_have_text("30, 212 MB in total; 1/4 of every block on each device, 53.1 MB")
    expect(fact(panel, "Gathered blocks")).to_contain_text("21.2 MB more per device")
    expect(fact(panel, "Memory needed")).to_have_text("about 2.85 GB of 2.90 GB per device")
    visitor.assert_accessible()


def test_replicated_base_model_shows_no_shards(fresh: Service, visit: Visit) -> None:
    seed.register(fresh.seeded.db, seed.gpus(2, bytes_of_each=10**10), bytes_of_each=10**10)
    job = queued(fresh, "replicated")
    seed.claim(fresh.seeded)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    panel = visitor.page.get_by_role("region", name="Base model placement")
    expect(fact(panel, "Base model")).to_have_text("replicated on 2 GPUs")
    expect(fact(panel, "Why")).to_contain_text("Each device holds a full replica of the base model")
    expect(fact(panel, "Blocks")).to_have_count(0)


def test_waiting_job_shows_possible_placements_until_it_trains(fresh: Service, visit: Visit) -> None:
    for worker_id in ("worker-hall-1", "worker-hall-2"):
        device = seed.gpus(4, bytes_of_each=EACH, strategy="zero3")
        seed.register(fresh.seeded.db, device, bytes_of_each=EACH, worker_id=worker_id)
    small = {"kind": "cpu", "name": "2 cores", "num_processes": 2}
    seed.register(fresh.seeded.db, small, bytes_of_each=10**8, worker_id="worker-small-1")
    job = queued(fresh, "waits")
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    panel = visitor.page.get_by_role("region", name="Possible placements")
    expect(panel.get_by_role("heading", level=3)).to_have_text(["1 worker with 1 CPU", "2 workers, each with 4 GPUs"])
    expect(fact(panel, "Base model")).to_have_text(
        ["full copy on 1 CPU", "sharded across 4 GPUs (DeepSpeed ZeRO-3)"],
    )
    expect(fact(panel, "Why").last).to_contain_text("LORRY_STRATEGY is zero3")
    visitor.assert_accessible()
    seed.claim(fresh.seeded)
    now = visitor.page.get_by_role("region", name="Base model placement")
    expect(fact(now, "Base model")).to_have_text("full copy on 1 CPU")
    expect(panel).to_have_count(0)


def test_finished_job_shows_no_placement(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/docstrings-r16"))

    expect(visitor.page.get_by_role("region", name="Configuration")).to_be_visible()
    expect(visitor.page.get_by_role("region", name="Base model placement")).to_have_count(0)


def test_worker_with_several_devices_shows_its_placement_strategy(fresh: Service, visit: Visit) -> None:
    seed.register(fresh.seeded.db, seed.gpus(4, bytes_of_each=EACH), bytes_of_each=EACH)
    report = {"capacity": {"max_jobs": 3, "memory_bytes_free": 10**8, "holding": "offloaded"}}
    digest = base_models.get(fresh.seeded.db, seed.BASE).digest
    workers.worker_beat(fresh.seeded.db, seed.WORKER, resident_base=digest, trainer_id=seed.TRAINER, report=report)
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    expect(fact(worker, "Devices")).to_have_text("4 x H100 (11.6 GB)")
    expect(fact(worker, "Placement strategy")).to_have_text(
        "auto: replicate if it fits, else shard, else shard and offload to CPU"
    )
    expect(fact(worker, "Base model placement")).to_have_text("sharded across 4 GPUs (FSDP2), offloaded to CPU")
    visitor.assert_accessible()


def test_worker_with_one_device_shows_no_placement_strategy(fresh: Service, visit: Visit) -> None:
    seed.beat(fresh.seeded)
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    expect(fact(worker, "Devices")).to_contain_text("2 cores")
    expect(fact(worker, "Placement strategy")).to_have_count(0)


def test_gang_worker_always_replicates_base_models(fresh: Service, visit: Visit) -> None:
    device = {**seed.gpus(4, bytes_of_each=EACH), "gang": "hall"}
    seed.register(fresh.seeded.db, device, bytes_of_each=EACH)
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    expect(fact(worker, "Gang")).to_have_text("hall")
    expect(fact(worker, "Placement strategy")).to_have_text("always replicated")
