"""A trainer that hangs, in a complete service: it is killed, and its job's logs show the stacks of its processes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from catalog.states import EndReason
from tests.system.api_process import api_process
from tests.system.test_killed_worker import small_job
from tests.worker_site import PEPPER, WorkerSite, worker_site

pytestmark = pytest.mark.timeout(1800)
IMPATIENT_IN_VERIFICATION = [sys.executable, "-m", "tests.system.impatient_in_verification"]
IMPATIENT = [sys.executable, "-m", "qa.chaos.impatient_worker"]
SECRET = "failpoints.py"
"""A secret of the worker that also occurs in every stack."""


def lines_of_first_attempt(site: WorkerSite, job_id: str) -> list[dict[str, Any]]:
    """Return the log lines of the first attempt, as the API shows them."""
    with api_process(site.settings.data_dir, pepper=PEPPER) as service:
        response = httpx.get(
            f"{service.url}/v1/fine_tuning/jobs/{job_id}/logs",
            params={"attempt": 1, "limit": 1000},
            headers={"authorization": f"Bearer {service.key}"},
            timeout=60,
            trust_env=False,
        )
    assert response.status_code == 200, response.text
    assert not response.json()["has_more"]
    return response.json()["data"]


def stacks_by_rank(site: WorkerSite, job_id: str) -> dict[int, str]:
    """Return the output of each process after its worker requested the stacks."""
    texts: dict[int, str] = {}
    for line in lines_of_first_attempt(site, job_id):
        texts[line["rank"]] = texts.get(line["rank"], "") + line["text"] + "\n"
    return {rank: text.partition("Stacks of its threads:")[2] for rank, text in texts.items()}


def hung(site: WorkerSite, failpoint: str, *, argv: list[str] = IMPATIENT, **environment: str) -> str:
    """Return a job whose first attempt has hung at the failpoint and timed out."""
    job_id = site.submit(site.upload(20), **small_job(max_steps=20, checkpoint_every_steps=5))
    worker = site.start(argv, FAILPOINT=failpoint, WIKI_TOKEN=SECRET, **environment)
    site.wait_until(lambda: site.reasons(job_id)[:1] == [EndReason.TIMEOUT])
    worker.terminate()
    assert worker.wait(site.patience_seconds) == 0, site.log()
    assert "The trainer sent no events for" in site.attempts(job_id)[0].detail
    return job_id


@pytest.mark.slow
def test_a_process_that_hangs_leaves_the_stacks_of_its_threads(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        job_id = hung(site, "step_12:hang")

        (text,) = stacks_by_rank(site, job_id).values()

    assert re.search(r"Current thread .*\n.* in _fail\n.* in pass_by\n.* in _handle_event", text), text
    assert "in _watch" in text, "the thread that watches the worker is missing"
    assert SECRET not in text


@pytest.mark.slow
def test_hanging_and_waiting_processes_log_their_own_stacks(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        job_id = hung(site, "step_12@1:hang", LORRY_CPU_PROCESSES="2")

        stacks = stacks_by_rank(site, job_id)

    assert set(stacks) == {0, 1}
    assert "in _fail" in stacks[1]
    assert "in _fail" not in stacks[0]
    assert re.search(r"in (broadcast|all_gather)\n", stacks[0]), stacks[0]
    assert re.search(r"ranks\.py\W+line \d+ in broadcast\n", stacks[0]), (
        "the call in which the first process waited is missing"
    )
    assert all(SECRET not in text for text in stacks.values())


@pytest.mark.slow
def test_a_hang_during_a_sharded_verification_is_detected_early(tmp_path: Path) -> None:
    """Otherwise the worker, and the process group, allow a busy trainer an hour."""
    with worker_site(tmp_path) as site:
        sharded = {"LORRY_CPU_PROCESSES": "2", "LORRY_STRATEGY": "fsdp2"}
        job_id = hung(site, "verifying@1:hang", argv=IMPATIENT_IN_VERIFICATION, **sharded)

        stacks = stacks_by_rank(site, job_id)
        detail = site.attempts(job_id)[0].detail or ""

    assert detail.endswith("s while it verified an adapter.")
    assert set(stacks) == {0, 1}
    assert "in _fail" in stacks[1]
    assert "in _fail" not in stacks[0]
    assert all("in verify_export" in text for text in stacks.values()), stacks
    assert re.search(r"in (wait_for_unshard|wait|all_gather\w*)\n", stacks[0]), stacks[0]
