"""The page of workers: base models, jobs and cordons."""

from __future__ import annotations

from catalog.fleet import cordons
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
