"""The list of jobs: row contents, counts, filters, and changes that appear without a reload, even after an outage."""

from __future__ import annotations

import re

from playwright.sync_api import APIResponse, Route, expect

from catalog.lifecycle import recording
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


def test_new_job_appears_in_the_list_without_a_reload(fresh: Service, visit: Visit) -> None:
    visitor = visit(fresh)
    visitor.open("#/jobs")
    visitor.page.evaluate("window.sameDocument = true")

    seed.submit(fresh.seeded, "arrives-later")

    visitor.page.get_by_role("link", name="arrives-later").wait_for()
    assert visitor.page.evaluate("window.sameDocument") is True


def test_progress_and_the_end_of_a_job_appear_in_the_list(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "moving")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    visitor = visit(fresh)
    visitor.open("#/jobs")

    seed.train(fresh.seeded, claim_id, until=60)
    visitor.page.get_by_text("60 / 240 steps").wait_for()
    seed.train(fresh.seeded, claim_id, since=60, until=seed.NUM_STEPS)
    seed.succeed(fresh.seeded, claim_id)

    expect(visitor.page.get_by_role("row").filter(has_text="moving")).to_contain_text("succeeded")
    expect(visitor.page.locator("[aria-live]").filter(has_text="moving is succeeded")).to_have_count(1)


def test_job_page_updates_charts_events_and_state(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "moving")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    seed.train(fresh.seeded, claim_id, until=40)
    visitor = visit(fresh)
    visitor.open(f"#/jobs/{job.id}")
    visitor.page.get_by_role("img", name="at step 40.").first.wait_for()

    seed.train(fresh.seeded, claim_id, since=40, until=120)
    recording.record_event(fresh.seeded.db, claim_id, "warn", "The learning rate is high for this data.")

    visitor.page.get_by_role("img", name="at step 120.").first.wait_for()
    visitor.page.get_by_text("step 120 of 240").wait_for()
    visitor.page.get_by_text("The learning rate is high for this data.").wait_for()


def test_late_response_does_not_revert_a_job(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "moving")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    seed.train(fresh.seeded, claim_id, until=40)
    visitor = visit(fresh)
    late: list[tuple[Route, APIResponse]] = []
    visitor.page.route(f"**/v1/fine_tuning/jobs/{job.id}", lambda route: late.append((route, route.fetch())))
    visitor.open(f"#/jobs/{job.id}")
    visitor.page.get_by_text("step 40 of 240").wait_for()

    seed.train(fresh.seeded, claim_id, since=40, until=120)
    visitor.page.get_by_text("step 120 of 240").wait_for()
    for route, response in late:
        route.fulfill(response=response)

    visitor.page.get_by_role("table", name="Attempts, newest first").wait_for()  # appears with the late response
    expect(visitor.page.get_by_text("step 120 of 240")).to_be_visible()


def test_finished_job_offers_its_adapter_without_a_reload(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "moving")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    visitor = visit(fresh)
    visitor.open(f"#/jobs/{job.id}")

    seed.train(fresh.seeded, claim_id, until=seed.NUM_STEPS)
    seed.succeed(fresh.seeded, claim_id)

    visitor.page.get_by_role("link", name="View adapter").click()
    visitor.page.get_by_role("heading", name="Verification").wait_for()


def test_lost_connection_is_shown_and_missed_changes_are_loaded(fresh: Service, visit: Visit) -> None:
    visitor = visit(fresh)
    visitor.open("#/jobs")
    visitor.page.get_by_text("Live", exact=True).wait_for()

    fresh.stop()
    visitor.page.get_by_text("Reconnecting").wait_for()
    seed.submit(fresh.seeded, "came-meanwhile")
    fresh.start()

    visitor.page.get_by_text("Live", exact=True).wait_for()
    visitor.page.get_by_role("link", name="came-meanwhile").wait_for()
    visitor.problems.clear()  # the browser logs each failed connection to the stopped service
