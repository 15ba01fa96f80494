"""The page of a job: its results, its state, and its charts with labels, line styles, text summaries and tables."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, expect
from sqlalchemy import select

from catalog.jobs import reproduction, submission
from catalog.lifecycle import recording
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_result_is_the_validation_loss_of_the_kept_step(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "best", evaluation={"keep": "best", "samples": {"prompts": ["How cold?"]}})
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    curve = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((0, 3.0), (120, 1.5), (240, 2.5))]
    recording.record_metrics(fresh.seeded.db, claim_id, curve)
    seed.succeed(fresh.seeded, claim_id, kept_step=120)
    visitor = visit(fresh)

    visitor.open("#/jobs")
    row = visitor.page.get_by_role("row").filter(has_text="best")
    assert row.get_by_role("cell").nth(2).inner_text().split()[:2] == ["validation", "1.500"]
    visitor.open(f"#/jobs/{job.id}")

    headline = visitor.page.get_by_role("region", name="Progress")
    expect(headline).to_contain_text("1.500")
    expect(headline).to_contain_text("best at step 120, used for the adapter; latest: 2.500")
    run = visitor.page.get_by_role("table", name="Run")
    assert run.get_by_role("row", name="sample prompts").inner_text().split("\t")[1:] == ['"How cold?"'] * 2


def test_job_duration_excludes_waiting_time(fresh: Service, visit: Visit) -> None:
    job_id = _done_after_waiting(fresh, waited=7200, ran=95)
    visitor = visit(fresh)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="waited-long")
    row.get_by_text("took 1 min 35 s").wait_for()
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_role("region", name="Progress").get_by_text("took 1 min 35 s").wait_for()


def test_failed_job_shows_its_error_and_remedy(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/hot-lr"))

    assert "The loss became NaN at step 38. Lower the learning rate" in visitor.text()


def test_current_attempt_has_the_state_running(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/titles-r16"))

    attempts = visitor.page.get_by_role("table", name="Attempts, newest first")
    state = attempts.get_by_role("row").nth(1).get_by_role("cell").first
    expect(attempts.get_by_role("columnheader").nth(1)).to_have_text("State")
    expect(state).to_have_text("running", use_inner_text=True)  # its label is for narrow windows
    visitor.open(filled.address("#/jobs/hot-lr"))
    expect(state).to_have_text("diverged", use_inner_text=True)


def test_epochs_are_fractional_if_max_steps_ends_the_job_first(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "short", max_steps=60)
    seed.prepare(fresh.seeded, num_steps=60)
    claim_id = seed.claim(fresh.seeded)[job.id]
    seed.train(fresh.seeded, claim_id, until=30, num_steps=60)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    visitor.page.get_by_text("step 30 of 60").wait_for()
    visitor.page.get_by_text("epoch 0.38 of 0.75").wait_for()  # 30 and 60 batches of 4 out of 320 rows
    run = visitor.page.get_by_role("table", name="Run")
    assert run.get_by_role("row", name="epochs").inner_text().split("\t")[1:] == [
        "3",
        "0.75 of 3 (max_steps)",
    ]
    visitor.open("#/jobs")
    assert (
        "epoch 0.38" in visitor.page.get_by_role("row").filter(has_text="short").inner_text()
    )  # as the worker reports it


def test_epoch_is_the_workers_count_capped_at_the_last_epoch(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "odd-batches")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    progress = {"step": 120, "num_steps": seed.NUM_STEPS, "epoch": 1.234}  # the steps alone would give 1.5
    recording.record_progress(fresh.seeded.db, claim_id, progress)
    visitor = visit(fresh)
    visitor.open("#/jobs")
    row = visitor.page.get_by_role("row").filter(has_text="odd-batches")
    row.get_by_text("epoch 1.23", exact=True).wait_for()

    recording.record_progress(fresh.seeded.db, claim_id, {**progress, "step": seed.NUM_STEPS, "epoch": 3.2})

    row.get_by_text("epoch 3.00", exact=True).wait_for()
    visitor.open(f"#/jobs/{job.id}")
    visitor.page.get_by_text("epoch 3.00 of 3").wait_for()


def test_job_page_shows_requested_and_resolved_values(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(filled.address("#/jobs/titles-r16"))

    adapter = visitor.page.get_by_role("table", name="Adapter")
    assert adapter.get_by_role("row", name=re.compile(r"^alpha \d")).inner_text().split() == ["alpha", "16", "16"]
    assert adapter.get_by_role("row", name="dropout").inner_text().split() == ["dropout", "default", "0"]
    visitor.page.get_by_text("signatures-train.jsonl").wait_for()


def test_job_page_links_to_packmates(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(filled.address("#/jobs/titles-r16"))

    visitor.page.get_by_role("region", name="Attempts").get_by_role("link", name="titles-r8").click()

    visitor.page.get_by_role("heading", name="titles-r8", level=1).wait_for()


def test_unknown_job_shows_an_error_with_a_remedy(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs/ftjob-nothing")

    alert = visitor.page.get_by_role("alert")
    alert.wait_for()
    assert "No job with the ID 'ftjob-nothing'." in alert.inner_text()
    assert "Check the ID" in alert.inner_text()


def _done_after_waiting(service: Service, *, waited: float, ran: float) -> str:
    """Create a job that waited `waited` seconds for its only attempt, which took `ran` seconds. Returns its id."""
    job = seed.submit(service.seeded, "waited-long")
    seed.prepare(service.seeded)
    claim_id = seed.claim(service.seeded)[job.id]
    seed.train(service.seeded, claim_id, until=seed.NUM_STEPS)
    seed.succeed(service.seeded, claim_id)
    with service.seeded.db.write() as session:
        row = session.get_one(Job, job.id)
        attempt = session.scalars(select(Attempt).where(Attempt.job_id == job.id)).one()
        assert attempt.ended_at is not None
        attempt.started_at = attempt.ended_at - ran
        row.created_at = attempt.started_at - waited
    return job.id


def test_job_page_shows_the_result_of_a_reproduction(fresh: Service, visit: Visit) -> None:
    seeded, job = fresh.seeded, seed.submit(fresh.seeded, "audited")
    seed.prepare(seeded)
    adapter_id = seed.succeed(seeded, seed.claim(seeded)[job.id])
    prepared = reproduction.prepare(seeded.db, seeded.caller, adapter_id)
    again = submission.create(seeded.db, caller=seeded.caller, request=prepared, body_digest="b" * 64)
    seed.prepare(seeded)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{again.id}")
    panel = visitor.page.get_by_role("region", name="Configuration")
    panel.get_by_text("after the job has succeeded", exact=True).wait_for()
    panel.get_by_role("link", name=prepared.name).wait_for()
    seed.succeed(seeded, seed.claim(seeded)[again.id])

    panel.get_by_text("The reproduction is identical", exact=False).wait_for()


RECORD_DASHES = """
window.dashes = [];
const setDash = CanvasRenderingContext2D.prototype.setLineDash;
CanvasRenderingContext2D.prototype.setLineDash = function (dash) {
  window.dashes.push([...dash]);
  setDash.call(this, dash);
};
"""
RECORD_TEXTS = """
window.texts = [];
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const { a, e } = this.getTransform();
  const width = this.measureText(text).width;
  const before = {right: width, end: width, center: width / 2}[this.textAlign] ?? 0;
  window.texts.push([text, a * (x - before) + e]);
  fillText.call(this, text, x, y);
};
"""


def test_chart_labels_are_not_cut_off(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, width=390)
    visitor.page.add_init_script(RECORD_TEXTS)
    rates = [0.00011 + step * 1.5e-7 for step in range(60)]
    points = [{"step": step, "loss": 1.0, "kind": "train", "learning_rate": rate} for step, rate in enumerate(rates)]
    curve = {"object": "list", "data": points, "has_more": False}
    visitor.page.route("**/metrics?kind=train", lambda route: route.fulfill(json=curve))
    visitor.page.route("**/stream", lambda route: route.abort())  # otherwise the stream adds the job's own points

    visitor.open(filled.address("#/jobs/titles-r16"))
    visitor.page.locator("figure").filter(has_text="Learning rate").locator("canvas").wait_for()

    texts: list[tuple[str, float]] = visitor.page.evaluate("window.texts")
    assert any(text.startswith("1.1") for text, _ in texts), texts
    assert [text for text, left in texts if left < 0] == []


def test_chart_summary_and_table_agree(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(filled.address("#/jobs/docstrings-r16"))

    chart = visitor.page.get_by_role("img", name=re.compile(r"^Training loss went from .* at step 240\."))
    summary = chart.get_attribute("aria-label") or ""
    visitor.page.get_by_text("Values as a table: Cross-entropy").click()

    rows = visitor.page.get_by_role("table", name="Cross-entropy by step").get_by_role("row")
    last = rows.last.inner_text().split()
    assert last[0] == "240"
    assert f"to {last[1]} at step 240" in summary


def test_validation_curve_is_recognizable_without_color(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, scheme="dark")
    visitor.page.add_init_script(RECORD_DASHES)

    visitor.open(filled.address("#/jobs/titles-r16"))

    chart = visitor.page.get_by_role("figure").filter(has_text="Cross-entropy")
    expect(chart.locator(".key")).to_have_count(3)
    train, smoothed, valid = (chart.locator(".key").nth(index) for index in range(3))
    assert [key.inner_text().split()[0] for key in (train, smoothed, valid)] == ["train", "smoothed", "validation"]
    assert [_line_style(key) for key in (train, smoothed, valid)] == ["1px none", "2.5px none", "2.5px 5px, 3.5px"]
    assert [key.locator("circle").count() for key in (train, smoothed, valid)] == [0, 0, 1]
    assert visitor.page.evaluate("window.dashes.some((dash) => dash.length > 0)")


def _line_style(key: Locator) -> str:
    style = "(line) => (({strokeWidth: a, strokeDasharray: b}) => `${a} ${b}`)(getComputedStyle(line))"
    return str(key.locator("line").evaluate(style))
