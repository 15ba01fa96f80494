"""The log of a job: its messages in few requests however long it trained, its points when they are asked for."""

from __future__ import annotations

from playwright.sync_api import expect

from catalog import claims
from tests.dashboard import seed
from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service
from tests.dashboard.visitor import Visitor


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


def _trained(service: Service, *, messages: list[str], points: int) -> str:
    """A job that has ended, with these words and then so many points in its log; its id."""
    job = seed.submit(service.seeded, "long")
    seed.prepare(service.seeded)
    claim_id = seed.claim(service.seeded)[job.id]
    for word in messages:
        claims.record_event(service.seeded.db, claim_id, "info", word)
    for number in range(points):
        claims.record_event(service.seeded.db, claim_id, "info", f"point {number}", type="metrics")
    seed.succeed(service.seeded, claim_id)
    return job.id


def _without_stream(service: Service, visit: Visit) -> tuple[Visitor, list[str]]:
    """A tab to which the job's stream stays silent, and the requests for events that it makes."""
    visitor = visit(service)
    asked: list[str] = []
    visitor.page.route("**/stream", lambda route: route.fulfill(status=204))
    visitor.page.on("request", lambda request: asked.append(request.url) if "/events" in request.url else None)
    return visitor, asked
