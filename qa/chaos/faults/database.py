"""Faults of the database: restarted, killed in a transaction, locked, read-only, unavailable, unreachable for one
worker."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psycopg
from sqlalchemy import make_url, text

from catalog.states import FINAL_STATES, EndReason
from qa.chaos.scenario import POSTGRESQL, Row
from qa.chaos.service import NUM_ROWS, PATIENCE_SECONDS, SMALL, FaultSite
from tests.services.fault_proxy import fault_proxy
from tests.worker_site import is_gone

LOCKED_SECONDS = 33.0
"""SQLite's writers give up after 30."""
LONG_LEASE = {"LORRY_LEASE_SECONDS": "60", "LORRY_HEARTBEAT_SECONDS": "1"}
ONCE = [EndReason.COMPLETED]


def _restarted(site: FaultSite) -> str:
    """Restart it while a job trains, for less than a lease. Meanwhile a client submits a job."""
    assert site.under.postgres is not None
    file_id, job_id = site.upload(NUM_ROWS), site.submit_small()
    site.start_api()
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, job_id)
    site.under.postgres.stop()
    refused = _submit(site, file_id, "while-down")
    site.gate("go").touch()
    site.wait_seconds(2)
    site.under.postgres.start()

    told = _assert_unavailable(refused)
    site.wait_for_success(job_id)
    assert site.reasons(job_id) == ONCE, site.attempts_text(job_id)
    _accepts(site, _submit(site, file_id, "while-down"))
    return f"{told}; then accepted. The running job: {site.attempts_text(job_id)}"


def _killed_in_submission(site: FaultSite) -> str:
    """Kill all its processes between the last statement of a submission and the commit."""
    assert site.under.postgres is not None
    file_id = site.upload(NUM_ROWS)
    site.start_api(FAILPOINT=f"submit_before_commit:wait={site.gate('commit')}")
    with ThreadPoolExecutor(max_workers=1) as pool:
        asked = pool.submit(_submit, site, file_id, "killed")
        site.wait_until(site.is_anybody_writing)
        site.under.postgres.kill()
        site.under.postgres.start()
        site.gate("commit").touch()
        told = _assert_unavailable(asked.result(PATIENCE_SECONDS))
    site.wait_until(lambda: site.num_jobs() == 0)

    answer = _submit(site, file_id, "killed")

    _accepts(site, answer)
    return f"{told}, no job left; the retry created one"


def _killed_in_completion(site: FaultSite) -> str:
    """Kill all its processes between the last statement of a completion and the commit."""
    assert site.under.postgres is not None
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"in_complete:wait={site.gate('commit')}")
    site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
    site.wait_until(site.is_anybody_writing)
    site.under.postgres.kill()
    site.under.postgres.start()
    site.gate("commit").touch()

    site.wait_for_success(job_id)

    assert site.reasons(job_id) == ONCE, site.attempts_text(job_id)
    return f"the worker completed it again: {site.attempts_text(job_id)}"


def _locked(site: FaultSite) -> str:
    """Lock the jobs for longer than SQLite's writers wait."""
    file_id, job_id = site.upload(NUM_ROWS), site.submit_small()
    site.start_api()
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, job_id)
    with ThreadPoolExecutor(max_workers=1) as pool:
        with _lock_of(site):
            site.gate("go").touch()
            asked = pool.submit(_submit, site, file_id, "locked")
            site.wait_seconds(LOCKED_SECONDS)
        answer = asked.result(PATIENCE_SECONDS)

    told = _assert_unavailable(answer) if answer.status_code != 200 else "the submission waited"
    site.wait_for_success(job_id)
    assert site.reasons(job_id) == ONCE, site.attempts_text(job_id)
    _accepts(site, _submit(site, file_id, "locked"))
    return f"{told}. The running job: {site.attempts_text(job_id)}"


@contextmanager
def _lock_of(site: FaultSite) -> Generator[None]:
    url = make_url(site.db.url)
    if site.db.is_sqlite:
        connection = sqlite3.connect(str(url.database), isolation_level=None, timeout=PATIENCE_SECONDS)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()
        return
    with psycopg.connect(site.db.url.replace("+psycopg", "")) as connection:
        connection.execute("lock table jobs in exclusive mode")
        yield


def _read_only(site: FaultSite) -> str:
    """Make the database read-only for a while, by a setting of the server."""
    file_id, job_id = site.upload(NUM_ROWS), site.submit_small()
    site.start_api()
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, job_id)
    _set_read_only(site, True)
    try:
        site.gate("go").touch()
        told = _assert_unavailable(_submit(site, file_id, "read-only"))
        assert site.ask("GET", f"/v1/fine_tuning/jobs/{job_id}").status_code == 200
    finally:
        _set_read_only(site, False)

    site.wait_for_success(job_id)

    assert site.reasons(job_id) == ONCE, site.attempts_text(job_id)
    _accepts(site, _submit(site, file_id, "read-only"))
    return f"{told}, reads still work. The running job: {site.attempts_text(job_id)}"


def _set_read_only(site: FaultSite, is_read_only: bool) -> None:
    word = "on" if is_read_only else "off"
    told = text("show default_transaction_read_only")
    with psycopg.connect(site.db.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("set default_transaction_read_only = off")
        connection.execute(f"alter system set default_transaction_read_only = {word}".encode())
        connection.execute("select pg_reload_conf()")

    def is_so() -> bool:
        with site.db.read() as session:
            return session.scalar(told) == word

    site.wait_until(is_so)


def _away_for_two_leases(site: FaultSite) -> str:
    """The worker kills its trainer before the lease expires, and continues once the database is available again."""
    assert site.under.postgres is not None
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    site.wait_for_step(15, job_id)
    trainer = site.trainer_of(worker)
    site.under.postgres.stop()
    gone_after = site.seconds_until(lambda: is_gone(trainer))
    site.wait_seconds(max(0.0, 2 * site.settings.lease_seconds - gone_after))
    site.under.postgres.start()
    site.gate("go").touch()

    assert gone_after < site.settings.lease_seconds, f"the trainer ended after {gone_after:.1f} s"
    site.wait_for_success(job_id)
    assert site.reasons(job_id) == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.attempts_text(job_id)
    assert site.attempts(job_id)[1].resumed_from_step == 10, site.attempts_text(job_id)
    return f"trainer gone before its lease expired; {site.attempts_text(job_id)}"


def _cut_off(site: FaultSite) -> str:
    """Cut the connection between one worker and the database for two leases. Another worker takes its job."""
    url = make_url(site.db.url)
    with fault_proxy(str(url.host), url.port or 0) as proxy:
        job_id = site.submit_small()
        through = site.db.url.replace(f":{url.port}/", f":{proxy.port}/")
        cut_off = site.start_worker(FAILPOINT="step_15:hang", LORRY_DATABASE_URL=through)
        site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
        site.wait_for_step(15, job_id)
        trainer = site.trainer_of(cut_off)
        proxy.part()
        gone_after = site.seconds_until(lambda: is_gone(trainer))
        assert gone_after < site.settings.lease_seconds, f"the trainer ended after {gone_after:.1f} s"
        site.finish(job_id)
        before = [event.seq for event in site.events(job_id)]

        proxy.heal()
        site.wait_seconds(site.settings.lease_seconds)

        assert [event.seq for event in site.events(job_id)] == before, "it wrote after it had lost its claim"
        cut_off.terminate()
        assert cut_off.wait(PATIENCE_SECONDS) == 0, site.log()
    assert site.reasons(job_id) == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.attempts_text(job_id)
    return f"trainer gone before its lease expired; {site.attempts_text(job_id)}; nothing written after the outage"


def _submit(site: FaultSite, file_id: str, key: str) -> httpx.Response:
    return site.post_job(file_id, idempotency_key=key, **SMALL)


def _assert_unavailable(response: httpx.Response) -> str:
    assert response.status_code == 503, f"{response.status_code} {response.text}"
    assert int(response.headers["retry-after"]) > 0
    return f"submit {response.status_code} with Retry-After {response.headers['retry-after']}"


def _accepts(site: FaultSite, response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    if site.job(response.json()["id"]).state not in FINAL_STATES:
        site.cancel(response.json()["id"])
        site.wait_for_end(response.json()["id"])


ROWS = (
    Row(
        name="database-restarted",
        fault="database restarted while a job trains",
        also="submit 503 and Retry-After; no lease expires",
        act=_restarted,
        databases=POSTGRESQL,
        environment=LONG_LEASE,
    ),
    Row(
        name="database-killed-submitting",
        fault="database killed in a submission's transaction",
        also="503, no job; the retry creates one",
        act=_killed_in_submission,
        databases=POSTGRESQL,
    ),
    Row(
        name="database-killed-completing",
        fault="database killed in the completing transaction",
        also="completed once",
        act=_killed_in_completion,
        databases=POSTGRESQL,
        environment=LONG_LEASE,
    ),
    Row(
        name="database-locked",
        fault="database locked for 33 s while a job trains",
        also="submit waits, or 503 and Retry-After; no lease expires",
        act=_locked,
        environment=LONG_LEASE,
    ),
    Row(
        name="database-read-only",
        fault="database read-only while a job trains",
        also="submit 503 and Retry-After; no lease expires",
        act=_read_only,
        databases=POSTGRESQL,
        environment=LONG_LEASE,
    ),
    Row(
        name="database-away",
        fault="database unavailable for two leases",
        also="the trainer exits before its lease expires; the job continues afterwards",
        act=_away_for_two_leases,
        databases=POSTGRESQL,
    ),
    Row(
        name="worker-cut-off",
        fault="one worker cut off from the database for two leases, then reconnected",
        also="its writes are refused; its trainer exited before its lease expired",
        act=_cut_off,
        databases=POSTGRESQL,
    ),
)
