"""The event log of a job: messages with few requests, and metrics on request."""

from __future__ import annotations

from playwright.sync_api import JSHandle, Page, Route, expect

from catalog.lifecycle import recording
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service
from tests.dashboard.visitor import Visitor

SECOND_PAGE = "**/events?*after=*"


def test_first_message_takes_one_request_despite_many_points(fresh: Service, visit: Visit) -> None:
    job_id = _trained(fresh, messages=["The very first word."], points=420)
    visitor, urls = _without_stream(fresh, visit)

    visitor.open(f"#/jobs/{job_id}")

    visitor.page.get_by_text("The very first word.").wait_for()
    expect(visitor.page.get_by_role("button", name="Older events")).to_have_count(0)
    visitor.page.wait_for_load_state("networkidle")
    assert len(urls) == 1
    assert "type=message" in urls[0]


def test_older_messages_continue_from_the_last_page(fresh: Service, visit: Visit) -> None:
    job_id = _trained(fresh, messages=[f"word {number}" for number in range(450)], points=0)
    visitor, urls = _without_stream(fresh, visit)
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_text("word 200", exact=True).wait_for()
    expect(visitor.page.get_by_text("word 100", exact=True)).to_have_count(0)
    urls.clear()

    visitor.page.get_by_role("button", name="Older events").click()

    visitor.page.get_by_text("word 0", exact=True).wait_for()
    expect(visitor.page.get_by_role("button", name="Older events")).to_have_count(0)
    assert all("after=" in address for address in urls)
    assert len(urls) == 2


def test_metrics_are_shown_on_request_without_gaps(fresh: Service, visit: Visit) -> None:
    job_id = _trained(fresh, messages=["The very first word."], points=420)
    visitor, _ = _without_stream(fresh, visit)
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_text("The very first word.").wait_for()

    visitor.page.get_by_role("checkbox", name="with metrics").check()

    visitor.page.get_by_text("Step 420/420: training loss=1.0000", exact=True).wait_for()
    expect(visitor.page.get_by_text("The very first word.")).to_have_count(0)
    visitor.page.get_by_role("button", name="Older events").click()
    visitor.page.get_by_text("The very first word.").wait_for()
    first = visitor.page.get_by_text("Step 1/420: training loss=1.0000", exact=True)
    first.wait_for()
    visitor.page.get_by_role("checkbox", name="with metrics").uncheck()
    expect(first).to_have_count(0)
    visitor.page.get_by_text("The very first word.").wait_for()


def test_retry_after_a_failed_page_leaves_no_gap(fresh: Service, visit: Visit) -> None:
    job_id, claim_id = _running(fresh)
    _record_words(fresh, claim_id, range(100))
    page, log = _log(fresh, visit, job_id)
    log.evaluate("(log) => log.refresh()")
    _record_words(fresh, claim_id, range(100, 350))

    page.route(SECOND_PAGE, lambda route: route.abort())
    assert log.evaluate("(log) => log.refresh().then(() => 'whole', () => 'failed')") == "failed"
    page.unroute(SECOND_PAGE)
    log.evaluate("(log) => log.refresh()")

    assert _words(log) == list(range(350))


def test_concurrent_reads_at_both_ends_leave_no_gap(fresh: Service, visit: Visit) -> None:
    job_id, claim_id = _running(fresh)
    _record_words(fresh, claim_id, range(350))
    page, log = _log(fresh, visit, job_id)
    log.evaluate("(log) => log.refresh()")
    oldest = log.evaluate("(log) => log.oldest")
    _record_words(fresh, claim_id, range(350, 670))
    late: list[Route] = []

    def hold(route: Route) -> None:
        late.append(route)

    page.route(f"**/events?*after={oldest}", hold)

    log.evaluate("(log) => { const newer = log.refresh(); log.late = log.older(); return newer; }")
    for route in late:
        route.continue_()
    log.evaluate("(log) => log.late")

    assert _words(log) == list(range(670 - 2 * 300, 670))
    assert log.evaluate("(log) => log.hasOlder")


def _running(service: Service) -> tuple[str, str]:
    """Start a job. Returns its id and the id of its claim."""
    job = seed.submit(service.seeded, "long")
    seed.prepare(service.seeded)
    return job.id, seed.claim(service.seeded)[job.id]


def _record_words(service: Service, claim_id: str, numbers: range) -> None:
    for number in numbers:
        recording.record_event(service.seeded.db, claim_id, "info", f"word {number}")


def _log(service: Service, visit: Visit, job_id: str) -> tuple[Page, JSHandle]:
    """Return a tab, and an event log in it that neither a stream nor a page updates."""
    visitor = visit(service)
    visitor.open("#/workers")
    make = "async (path) => new (await import('/dashboard/js/event_log.js')).EventLog(path)"
    return visitor.page, visitor.page.evaluate_handle(make, f"/v1/fine_tuning/jobs/{job_id}")


def _words(log: JSHandle) -> list[int]:
    """Return the numbers of the shown messages, oldest first."""
    shown: list[str] = log.evaluate("(log) => log.shown().map((event) => event.message)")
    return [int(message.removeprefix("word ")) for message in reversed(shown) if message.startswith("word ")]


def _trained(service: Service, *, messages: list[str], points: int) -> str:
    """Create a succeeded job whose log has these messages, then `points` metrics events. Returns its id."""
    job = seed.submit(service.seeded, "long")
    seed.prepare(service.seeded, num_steps=points or seed.NUM_STEPS)
    claim_id = seed.claim(service.seeded)[job.id]
    for word in messages:
        recording.record_event(service.seeded.db, claim_id, "info", word)
    for number in range(points):
        recording.record_metrics(service.seeded.db, claim_id, [{"kind": "train", "step": number + 1, "loss": 1.0}])
    seed.succeed(service.seeded, claim_id)
    return job.id


def _without_stream(service: Service, visit: Visit) -> tuple[Visitor, list[str]]:
    """Return a tab without the job's stream, and the URLs of the events that it requests."""
    visitor = visit(service)
    urls: list[str] = []
    visitor.page.route("**/stream", lambda route: route.fulfill(status=204))
    visitor.page.on("request", lambda request: urls.append(request.url) if "/events" in request.url else None)
    return visitor, urls
