"""Faults of the API server: killed around a commit, terminated during a request, killed while it sends a webhook."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
from sqlalchemy import select

from api.settings import ApiSettings
from catalog.pepper import Pepper
from catalog.tables.jobs import Job
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.webhooks import endpoints
from qa.chaos.scenario import Row
from qa.chaos.service import NUM_ROWS, PATIENCE_SECONDS, SMALL, FaultSite
from tests.api.hook_receiver import Answer, Received, receiving
from tests.worker_site import PEPPER

KEY = "submission-1"
MARGIN_SECONDS = 20.0
"""Allowed in addition to the time for running requests (LORRY_SHUTDOWN_SECONDS). systemd allows 30 s in total."""


def _killed(site: FaultSite, *, failpoint: str, num_jobs: int) -> str:
    """kill -9 of the API server during a submission, which the client then repeats."""
    file_id = site.upload(NUM_ROWS)
    api = site.start_api(FAILPOINT=f"{failpoint}:kill")
    try:
        site.post_job(file_id, idempotency_key=KEY, **SMALL)
    except httpx.TransportError as error:
        lost = type(error).__name__
    else:
        raise AssertionError("there was a response")
    assert api.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    there = job_ids(site)
    assert len(there) == num_jobs, f"{len(there)} jobs were left"

    site.start_api()
    answers = [site.post_job(file_id, idempotency_key=KEY, **SMALL) for _ in range(2)]

    named = {answer.json()["id"] for answer in answers}
    assert named == set(job_ids(site)), f"responses named {named}"
    assert set(there) <= named, "the retry created another job"
    site.cancel(*named)
    return f"{lost}, {num_jobs} jobs left; the retries named one job"


def _asked_to_end(site: FaultSite) -> str:
    """SIGTERM while a submission is in its transaction: it gets a response, and no new request is accepted."""
    file_id = site.upload(NUM_ROWS)
    api = site.start_api(FAILPOINT=f"submit_before_commit:wait={site.gate('commit')}")
    with ThreadPoolExecutor(max_workers=1) as pool:
        asked = pool.submit(site.post_job, file_id, idempotency_key=KEY, **SMALL)
        site.wait_until(lambda: _is_in_request(site))
        api.terminate()
        asked_at = time.monotonic()
        site.wait_until(lambda: _takes_no_more(site))
        site.gate("commit").touch()
        answer = asked.result(PATIENCE_SECONDS)

    assert answer.status_code == 200, answer.text
    assert api.wait(PATIENCE_SECONDS) == 0, site.log()
    seconds = time.monotonic() - asked_at
    allowed = ApiSettings().shutdown_seconds + MARGIN_SECONDS
    assert seconds < allowed, f"it took {seconds:.0f} s to exit, but {allowed:.0f} s are allowed"
    site.cancel(answer.json()["id"])
    return f"the open request got a 200; the API server exited with status 0, {seconds:.1f} s after SIGTERM"


def _killed_while_it_tells(site: FaultSite) -> str:
    """kill -9 while a webhook is in flight: it is sent again, with the same id."""
    with receiving() as receiver:
        has_come, may_answer = threading.Event(), threading.Event()

        def answer(request: Received) -> Answer:
            site.heard(request.body, event_id=request.headers["webhook-id"])
            has_come.set()
            may_answer.wait(PATIENCE_SECONDS)
            return Answer()

        receiver.answer = answer
        add_endpoint(site, receiver.url)
        api = site.start_api()
        site.cancel(site.submit_small())
        assert has_come.wait(PATIENCE_SECONDS), site.log()
        api.kill()
        api.wait()
        may_answer.set()
        site.start_api()
        site.wait_until(lambda: len(site.hooks) > 1)
        site.wait_until(lambda: all_delivered(site))
    ids = {hook.event_id for hook in site.hooks}
    assert len(ids) == 1, f"it came as {ids}"
    return f"{len(site.hooks)} requests with one id"


def job_ids(site: FaultSite) -> list[str]:
    with site.db.read() as session:
        return [job.id for job in session.query(Job)]


def add_endpoint(site: FaultSite, url: str) -> None:
    wanted: Any = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
    given = {"name": "ops", "url": url, "event_types": wanted, "pepper": Pepper(current=PEPPER.encode())}
    endpoints.create(site.db, project_id=site.caller.project_id, **given)


def all_delivered(site: FaultSite) -> bool:
    """Return whether all webhooks of the site's own project are delivered. Endpoints of other tenants may never
    answer."""
    own = select(WebhookDelivery.status).join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
    with site.db.read() as session:
        statuses = session.scalars(own.where(WebhookEndpoint.project_id == site.caller.project_id)).all()
    return all(status == "delivered" for status in statuses)


def _is_in_request(site: FaultSite) -> bool:
    """Return whether the submission is at its failpoint: it holds SQLite's lock, or a transaction of PostgreSQL."""
    return site.is_anybody_writing()


def _takes_no_more(site: FaultSite) -> bool:
    try:
        site.ask("GET", "/healthz", timeout=5)
    except httpx.TransportError:
        return True
    return False


ROWS = (
    Row(
        name="api-killed-before-commit",
        fault="kill -9 of the API server before the commit of a submission",
        also="no job; the retry creates one",
        act=partial(_killed, failpoint="submit_before_commit", num_jobs=0),
    ),
    Row(
        name="api-killed-after-commit",
        fault="kill -9 of the API server after the commit of a submission and before the response",
        also="the retry returns the same job",
        act=partial(_killed, failpoint="submit_after_commit", num_jobs=1),
    ),
    Row(
        name="api-sigterm",
        fault="SIGTERM of the API server during a submission",
        also="the request gets a response; exit status 0 within the grace time",
        act=_asked_to_end,
    ),
    Row(
        name="api-killed-telling",
        fault="kill -9 of the API server while it sends a webhook",
        also="it is sent again with the same id",
        act=_killed_while_it_tells,
    ),
)
