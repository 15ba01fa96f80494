"""The log of a job: its messages in few requests however long it trained, its points when they are asked for."""

from __future__ import annotations

from playwright.sync_api import JSHandle, Page, Route, expect

from catalog.lifecycle import recording
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service
from tests.dashboard.visitor import Visitor

SECOND_PAGE = "**/events?*after=*"


def test_the_first_message_takes_one_request_however_many_points_came_after_it(fresh: Service, visit: Visit) -> None:
    job_id = _trained(fresh, messages=["The very first word."], points=420)
    visitor, asked = _without_stream(fresh, visit)

    visitor.open(f"#/jobs/{job_id}")

    visitor.page.get_by_text("The very first word.").wait_for()
    expect(visitor.page.get_by_role("button", name="Older events")).to_have_count(0)
    visitor.page.wait_for_load_state("networkidle")
    assert len(asked) == 1
    assert "type=message" in asked[0]


def test_older_messages_are_read_from_where_the_last_look_ended(fresh: Service, visit: Visit) -> None:
    job_id = _trained(fresh, messages=[f"word {number}" for number in range(450)], points=0)
    visitor, asked = _without_stream(fresh, visit)
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_text("word 200", exact=True).wait_for()
    expect(visitor.page.get_by_text("word 100", exact=True)).to_have_count(0)
    asked.clear()

    visitor.page.get_by_role("button", name="Older events").click()

    visitor.page.get_by_text("word 0", exact=True).wait_for()
    expect(visitor.page.get_by_role("button", name="Older events")).to_have_count(0)
    assert all("after=" in address for address in asked)
    assert len(asked) == 2


def test_points_are_shown_when_they_are_asked_for_without_gaps(fresh: Service, visit: Visit) -> None:
    job_id = _trained(fresh, messages=["The very first word."], points=420)
    visitor, _ = _without_stream(fresh, visit)
    visitor.open(f"#/jobs/{job_id}")
    visitor.page.get_by_text("The very first word.").wait_for()

    visitor.page.get_by_role("checkbox", name="with metrics").check()

    visitor.page.get_by_text("point 419", exact=True).wait_for()
    expect(visitor.page.get_by_text("The very first word.")).to_have_count(0)
    visitor.page.get_by_role("button", name="Older events").click()
    visitor.page.get_by_text("The very first word.").wait_for()
    visitor.page.get_by_text("point 0", exact=True).wait_for()
    visitor.page.get_by_role("checkbox", name="with metrics").uncheck()
    expect(visitor.page.get_by_text("point 0", exact=True)).to_have_count(0)
    visitor.page.get_by_text("The very first word.").wait_for()


def test_a_look_that_fails_half_way_leaves_no_gap_when_it_is_tried_again(fresh: Service, visit: Visit) -> None:
    job_id, claim_id = _running(fresh)
    _say(fresh, claim_id, range(100))
    page, log = _log(fresh, visit, job_id)
    log.evaluate("(log) => log.refresh()")
    _say(fresh, claim_id, range(100, 350))

    page.route(SECOND_PAGE, lambda route: route.abort())
    assert log.evaluate("(log) => log.refresh().then(() => 'whole', () => 'failed')") == "failed"
    page.unroute(SECOND_PAGE)
    log.evaluate("(log) => log.refresh()")

    assert _words(log) == list(range(350))


def test_looks_at_both_ends_at_once_leave_no_gap_between_them(fresh: Service, visit: Visit) -> None:
    job_id, claim_id = _running(fresh)
    _say(fresh, claim_id, range(350))
    page, log = _log(fresh, visit, job_id)
    log.evaluate("(log) => log.refresh()")
    oldest = log.evaluate("(log) => log.oldest")
    _say(fresh, claim_id, range(350, 670))
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
    """The ids of a job and of its claim."""
    job = seed.submit(service.seeded, "long")
    seed.prepare(service.seeded)
    return job.id, seed.claim(service.seeded)[job.id]


def _say(service: Service, claim_id: str, numbers: range) -> None:
    for number in numbers:
        recording.record_event(service.seeded.db, claim_id, "info", f"word {number}")


def _log(service: Service, visit: Visit, job_id: str) -> tuple[Page, JSHandle]:
    """A tab, and in it a log of the job that no stream and no page moves along."""
    visitor = visit(service)
    visitor.open("#/workers")
    make = "async (path) => new (await import('/dashboard/js/event_log.js')).EventLog(path)"
    return visitor.page, visitor.page.evaluate_handle(make, f"/v1/fine_tuning/jobs/{job_id}")


def _words(log: JSHandle) -> list[int]:
    """The numbers of the words that it shows, oldest first."""
    shown: list[str] = log.evaluate("(log) => log.shown().map((event) => event.message)")
    return [int(message.removeprefix("word ")) for message in reversed(shown) if message.startswith("word ")]


def _trained(service: Service, *, messages: list[str], points: int) -> str:
    """A job that has ended, with these words and then so many points in its log; its id."""
    job = seed.submit(service.seeded, "long")
    seed.prepare(service.seeded)
    claim_id = seed.claim(service.seeded)[job.id]
    for word in messages:
        recording.record_event(service.seeded.db, claim_id, "info", word)
    for number in range(points):
        recording.record_event(service.seeded.db, claim_id, "info", f"point {number}", type="metrics")
    seed.succeed(service.seeded, claim_id)
    return job.id


def _without_stream(service: Service, visit: Visit) -> tuple[Visitor, list[str]]:
    """A tab to which the job's stream stays silent, and the requests for events that it makes."""
    visitor = visit(service)
    asked: list[str] = []
    visitor.page.route("**/stream", lambda route: route.fulfill(status=204))
    visitor.page.on("request", lambda request: asked.append(request.url) if "/events" in request.url else None)
    return visitor, asked
