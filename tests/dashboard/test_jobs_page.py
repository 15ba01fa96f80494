"""The list of jobs: row contents, counts and filters."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_row_shows_state_progress_loss_and_remaining_time(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="titles-r16")
    row.get_by_role("img", name="Training loss of titles-r16").wait_for()
    assert "running" in row.inner_text()
    assert "121 / 240 steps" in row.inner_text()
    assert "2 min 47 s" in row.inner_text()


def test_tally_counts_running_waiting_paused_and_succeeded_jobs(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs")

    tally = " ".join(visitor.page.locator(".tally").inner_text().split())
    assert re.fullmatch(r"\d+ running \d+ waiting 1 paused \d+ succeeded", tally)


def test_row_shows_validation_and_training_loss(filled: Service, visit: Visit) -> None:
    progress = filled.job("titles-r16").progress or {}
    visitor = visit(filled)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="titles-r16")
    cells = row.get_by_role("cell").nth(2).inner_text().split()
    assert cells == ["validation", f"{progress['valid_loss']:.3f}", "train", f"{progress['loss']:.3f}"]
    assert (
        f"validation {progress['valid_loss']:.3f}"
        in visitor.page.get_by_role("region", name="Training now").inner_text()
    )


def test_waiting_job_shows_why_it_waits(filled: Service, visit: Visit) -> None:
    seed.beat(filled.seeded)
    visitor = visit(filled)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="nightly-b")
    row.get_by_text("1 job is ahead of it.").wait_for()
    assert "2nd in the queue" in row.inner_text()


def test_filters_narrow_the_list_and_persist_in_the_url(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open("#/jobs")

    visitor.page.get_by_role("button", name="Succeeded").click()
    visitor.page.get_by_role("searchbox").fill("r64")

    names = visitor.page.locator("tbody th a")
    expect(names).to_have_text(["docstrings-r64"])
    visitor.page.reload()
    expect(names).to_have_text(["docstrings-r64"])
