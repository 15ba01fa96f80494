"""Every page, in both widths and both colour schemes: it fits, it is accessible, and it keeps to the policy."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator
from sqlalchemy import select

from catalog import claims, files, jobs
from catalog.tables import Attempt, Job
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service
from tests.dashboard.visitor import Visitor

PLACES = {
    "jobs": "#/jobs",
    "running job": "#/jobs/titles-r16",
    "failed job": "#/jobs/hot-lr",
    "queued job": "#/jobs/nightly-b",
    "queue": "#/queue",
    "adapters": "#/adapters",
    "adapter": "#/adapters/docstrings-r16",
    "models": "#/models",
    "files": "#/files",
    "workers": "#/workers",
    "no such page": "#/nowhere",
}
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
LOOKS = [(1280, "light"), (390, "dark")]
OTHER_LOOKS = [(1280, "dark"), (390, "light")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_page_fits_its_window_and_is_accessible(
    filled: Service, visit: Visit, place: str, width: int, scheme: str
) -> None:
    visitor = visit(filled, width=width, scheme=scheme)

    visitor.open(address(filled, PLACES[place]))
    visitor.page.wait_for_load_state("load")

    visitor.assert_fits()
    visitor.assert_accessible()


@pytest.mark.parametrize(("width", "scheme"), [*OTHER_LOOKS, (320, "light"), (740, "dark"), (870, "light")])
def test_no_page_is_wider_than_its_window_in_the_other_looks(
    filled: Service, visit: Visit, width: int, scheme: str
) -> None:
    visitor = visit(filled, width=width, scheme=scheme)

    for place in PLACES.values():
        visitor.open(address(filled, place))

        visitor.assert_fits()


@pytest.mark.parametrize(("width", "scheme"), [*LOOKS, *OTHER_LOOKS])
def test_the_sign_in_page_fits_its_window_and_is_accessible(
    filled: Service, visit: Visit, width: int, scheme: str
) -> None:
    visitor = visit(filled, width=width, scheme=scheme, signed_in=False)

    visitor.open("#/jobs")

    visitor.page.get_by_role("heading", name="Sign in to Lorry").wait_for()
    visitor.assert_fits()
    visitor.assert_accessible()


def test_the_jobs_page_tells_state_progress_loss_and_when_each_is_done(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="titles-r16")
    row.get_by_role("img", name="Training loss of titles-r16").wait_for()
    assert "running" in row.inner_text()
    assert "121 / 240 steps" in row.inner_text()
    assert "2 min 47 s" in row.inner_text()


def test_the_jobs_page_counts_the_paused_beside_the_running_and_the_waiting(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs")

    tally = " ".join(visitor.page.locator(".tally").inner_text().split())
    assert re.fullmatch(r"\d+ running \d+ waiting 1 paused \d+ succeeded", tally)


def test_a_curves_labels_are_whole_however_long_its_numbers_are(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, width=390)
    visitor.page.add_init_script(RECORD_TEXTS)
    rates = [0.00011 + step * 1.5e-7 for step in range(60)]
    points = [{"step": step, "loss": 1.0, "kind": "train", "learning_rate": rate} for step, rate in enumerate(rates)]
    curve = {"object": "list", "data": points, "has_more": False}
    visitor.page.route("**/metrics?kind=train", lambda route: route.fulfill(json=curve))

    visitor.open(address(filled, PLACES["running job"]))
    visitor.page.locator("figure").filter(has_text="Learning rate").locator("canvas").wait_for()

    texts: list[tuple[str, float]] = visitor.page.evaluate("window.texts")
    assert any(text.startswith("1.1") for text, _ in texts), texts
    assert [text for text, left in texts if left < 0] == []


def test_the_jobs_page_tells_the_held_out_loss_beside_that_of_the_last_batch(filled: Service, visit: Visit) -> None:
    progress = _job(filled, "titles-r16").progress or {}
    visitor = visit(filled)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="titles-r16")
    told = row.get_by_role("cell").nth(2).inner_text().split()
    assert told == ["held-out", f"{progress['valid_loss']:.3f}", "train", f"{progress['loss']:.3f}"]
    assert (
        f"held-out {progress['valid_loss']:.3f}" in visitor.page.get_by_role("region", name="Training now").inner_text()
    )


def test_the_result_of_a_job_is_the_held_out_loss_of_the_step_that_is_kept(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "best", evaluation={"keep": "best", "samples": {"prompts": ["How cold?"]}})
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    curve = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((0, 3.0), (120, 1.5), (240, 2.5))]
    claims.record_metrics(fresh.seeded.db, claim_id, curve)
    seed.succeed(fresh.seeded, claim_id, kept_step=120)
    visitor = visit(fresh)

    visitor.open("#/jobs")
    row = visitor.page.get_by_role("row").filter(has_text="best")
    assert row.get_by_role("cell").nth(2).inner_text().split()[:2] == ["held-out", "1.500"]
    visitor.open(f"#/jobs/{job.id}")

    headline = visitor.page.get_by_role("region", name="Progress").inner_text()
    assert "1.500" in headline
    assert "at step 120, whose weights are kept; 2.500 at the last" in headline
    run = visitor.page.get_by_role("table", name="Run")
    assert run.get_by_role("row", name="sample prompts").inner_text().split("\t")[1:] == ['"How cold?"'] * 2


def test_the_time_that_a_job_took_is_that_on_a_worker(fresh: Service, visit: Visit) -> None:
    job_id = _done_after_waiting(fresh, waited=7200, ran=95)
    visitor = visit(fresh)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="waited-long")
    row.get_by_text("took 1 min 35 s").wait_for()
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_role("region", name="Progress").get_by_text("took 1 min 35 s").wait_for()


def test_a_waiting_job_tells_why_it_waits(filled: Service, visit: Visit) -> None:
    seed.beat(filled.seeded)
    visitor = visit(filled)

    visitor.open("#/jobs")

    row = visitor.page.get_by_role("row").filter(has_text="nightly-b")
    row.get_by_text("1 job is ahead of it.").wait_for()
    assert "2nd in the queue" in row.inner_text()


def test_a_failed_job_tells_what_went_wrong_and_what_to_do(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(address(filled, "#/jobs/hot-lr"))

    assert "The loss became NaN at step 38. Lower the learning rate" in visitor.text()


def test_filters_narrow_the_list_and_stay_in_the_address(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open("#/jobs")

    visitor.page.get_by_role("button", name="Succeeded").click()
    visitor.page.get_by_role("searchbox").fill("r64")

    names = visitor.page.locator("tbody th a")
    assert names.all_inner_texts() == ["docstrings-r64"]
    visitor.page.reload()
    visitor.page.locator("tbody th a").first.wait_for()
    assert names.all_inner_texts() == ["docstrings-r64"]


def test_a_chart_has_a_sentence_and_a_table_that_say_the_same(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(address(filled, "#/jobs/docstrings-r16"))

    summary = visitor.page.get_by_role("img", name="Training loss went from").get_attribute("aria-label") or ""
    visitor.page.get_by_text("Numbers as a table: Cross-entropy").click()

    rows = visitor.page.get_by_role("table", name="Cross-entropy by step").get_by_role("row")
    last = rows.last.inner_text().split()
    assert last[0] == "240"
    assert f"to {last[1]} at step 240" in summary


def test_the_held_out_curve_is_told_from_the_others_without_its_colour(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, scheme="dark")
    visitor.page.add_init_script(RECORD_DASHES)

    visitor.open(address(filled, "#/jobs/titles-r16"))

    chart = visitor.page.get_by_role("figure").filter(has_text="Cross-entropy")
    train, smoothed, held_out = (chart.locator(".key").nth(index) for index in range(3))
    assert [key.inner_text().split()[0] for key in (train, smoothed, held_out)] == ["train", "smoothed", "held-out"]
    assert [_line_style(key) for key in (train, smoothed, held_out)] == ["1px none", "2.5px none", "2.5px 5px, 3.5px"]
    assert [key.locator("circle").count() for key in (train, smoothed, held_out)] == [0, 0, 1]
    assert visitor.page.evaluate("window.dashes.some((dash) => dash.length > 0)")


def test_an_attempt_that_goes_on_has_the_state_running(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(address(filled, "#/jobs/titles-r16"))

    attempts = visitor.page.get_by_role("table", name="Every attempt")
    assert attempts.get_by_role("columnheader").all_inner_texts()[1] == "State"
    assert attempts.get_by_role("row").nth(1).get_by_role("cell").first.inner_text().strip() == "running"
    visitor.open(address(filled, "#/jobs/hot-lr"))
    assert attempts.get_by_role("row").nth(1).get_by_role("cell").first.inner_text().strip() == "diverged"


def test_epochs_are_counted_in_rows_where_max_steps_ends_the_job_first(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "short", max_steps=60)
    seed.prepare(fresh.seeded, num_steps=60)
    claim_id = seed.claim(fresh.seeded)[job.id]
    seed.train(fresh.seeded, claim_id, until=30, num_steps=60)
    visitor = visit(fresh)

    visitor.open(f"#/jobs/{job.id}")

    visitor.page.get_by_text("step 30 of 60").wait_for()
    visitor.page.get_by_text("epoch 0.38 of 0.75").wait_for()  # 30 and 60 batches of 4 out of 320 rows
    run = visitor.page.get_by_role("table", name="Run")
    assert run.get_by_role("row", name="epochs").inner_text().split("\t")[1:] == ["3", "0.75 of 3, for max_steps"]
    visitor.open("#/jobs")
    assert "epoch 0.38" in visitor.page.get_by_role("row").filter(has_text="short").inner_text()  # as the worker counts


def test_the_epoch_is_that_which_the_worker_counts_and_never_beyond_the_last(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "odd-batches")
    seed.prepare(fresh.seeded)
    claim_id = seed.claim(fresh.seeded)[job.id]
    told = {"step": 120, "num_steps": seed.NUM_STEPS, "epoch": 1.234}  # by its steps it would be 1.5
    claims.record_progress(fresh.seeded.db, claim_id, told)
    visitor = visit(fresh)
    visitor.open("#/jobs")
    row = visitor.page.get_by_role("row").filter(has_text="odd-batches")
    row.get_by_text("epoch 1.23", exact=True).wait_for()

    claims.record_progress(fresh.seeded.db, claim_id, {**told, "step": seed.NUM_STEPS, "epoch": 3.2})

    row.get_by_text("epoch 3.00", exact=True).wait_for()
    visitor.open(f"#/jobs/{job.id}")
    visitor.page.get_by_text("epoch 3.00 of 3").wait_for()


def test_a_lineage_tells_the_licence_of_the_base_and_the_names_of_the_files(fresh: Service, visit: Visit) -> None:
    job = seed.submit(fresh.seeded, "recorded")
    seed.prepare(fresh.seeded)
    adapter_id = seed.succeed(fresh.seeded, seed.claim(fresh.seeded)[job.id])
    files.delete(fresh.seeded.db, project_id=job.project_id, file_id=fresh.seeded.validation.id)
    visitor = visit(fresh)

    visitor.open(f"#/adapters/{adapter_id}")

    lineage = visitor.page.get_by_role("region", name="Lineage")
    lineage.get_by_text("signatures-train.jsonl", exact=False).wait_for()
    told = lineage.inner_text().split("\n")
    assert told[told.index("Its licence") + 1] == "apache-2.0"
    assert f"signatures-train.jsonl {fresh.seeded.training.id}, 320 rows" in lineage.inner_text()
    assert f"{fresh.seeded.validation.id}, 96 rows" in lineage.inner_text()


def test_a_job_page_shows_what_was_asked_for_beside_what_it_came_to(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open(address(filled, "#/jobs/titles-r16"))

    adapter = visitor.page.get_by_role("table", name="Adapter")
    assert adapter.get_by_role("row", name=re.compile(r"^alpha \d")).inner_text().split() == ["alpha", "16", "16"]
    assert adapter.get_by_role("row", name="dropout").inner_text().split() == ["dropout", "default", "0"]
    visitor.page.get_by_text("signatures-train.jsonl").wait_for()


def test_a_job_page_links_to_the_jobs_it_trained_together_with(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open(address(filled, "#/jobs/titles-r16"))

    visitor.page.get_by_role("region", name="Attempts").get_by_role("link", name="titles-r8").click()

    visitor.page.get_by_role("heading", name="titles-r8", level=1).wait_for()


def test_a_worker_shows_the_base_it_holds_and_the_jobs_aboard(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    worker.get_by_role("link", name="titles-r32").wait_for()
    assert "smollm2-135m" in worker.inner_text()
    assert "3 adapters aboard" in worker.inner_text()


def test_a_worker_whose_trainer_holds_no_job_is_idle_and_has_no_speed(fresh: Service, visit: Visit) -> None:
    seed.beat(fresh.seeded)
    visitor = visit(fresh)

    visitor.open("#/workers")

    worker = visitor.page.get_by_role("region", name="bay-1")
    worker.get_by_text("idle, base loaded").wait_for()
    assert "Tokens per second" not in worker.inner_text()


def test_a_worker_that_trains_for_another_project_is_training(fresh: Service, visit: Visit) -> None:
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


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("#/jobs", "lorry jobs submit smollm2-135m train.jsonl"),
        ("#/queue", "lorry jobs submit"),
        ("#/adapters", "lorry jobs submit"),
    ],
)
def test_an_empty_page_names_the_next_command(fresh: Service, visit: Visit, place: str, command: str) -> None:
    visitor = visit(fresh)

    visitor.open(place)

    assert command in visitor.text()
    visitor.assert_accessible()


def test_an_unknown_job_is_an_error_with_a_remedy(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.open("#/jobs/ftjob-nothing")

    alert = visitor.page.get_by_role("alert")
    alert.wait_for()
    assert "No job with the id 'ftjob-nothing'." in alert.inner_text()
    assert "Check the id" in alert.inner_text()


def test_the_chosen_colours_are_remembered(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, scheme="light")
    visitor.open("#/jobs")
    button = visitor.page.get_by_role("button", name="Colours")

    button.click()
    button.click()
    visitor.page.reload()
    visitor.page.locator("main h1").wait_for()

    assert _background(visitor) == "rgb(19, 23, 24)"


def address(service: Service, place: str) -> str:
    """The same place with the id of the job, or of its adapter, in place of its suffix."""
    kind, _, suffix = place.removeprefix("#/").partition("/")
    if not suffix:
        return place
    job = _job(service, suffix)
    return f"#/{kind}/{job.adapter_name if kind == 'adapters' else job.id}"


def _job(service: Service, suffix: str) -> Job:
    known = jobs.list_page(service.seeded.db, project_id=service.seeded.caller.project_id, limit=50).items
    return next(job for job in known if job.suffix == suffix)


def _done_after_waiting(service: Service, *, waited: float, ran: float) -> str:
    """The id of a job that was made `waited` seconds before its only attempt, which lasted `ran`."""
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


def _line_style(key: Locator) -> str:
    style = "(line) => (({strokeWidth: a, strokeDasharray: b}) => `${a} ${b}`)(getComputedStyle(line))"
    return str(key.locator("line").evaluate(style))


def _background(visitor: Visitor) -> str:
    return str(visitor.page.evaluate("getComputedStyle(document.body).backgroundColor"))
