"""The parts of a soak without a run: the random faults, and the assessment, which finds planted problems."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from catalog.spec.job import JobRequest
from qa.chaos.soak import job_kinds
from qa.chaos.soak.assessment import (
    MIN_SAMPLES,
    Compared,
    Ended,
    Isolated,
    Stretch,
    compare,
    effects,
    ended,
    problems,
    slow,
)
from qa.chaos.soak.storm import FAILPOINTS, KINDS, Storm, Window, draw
from qa.chaos.soak.tenants import Sample
from worker.process.exit_status import WAS_KILLED

SUBMITTED = {"key-1": "sft-1", "key-2": "dpo-1"}
DIGESTS = {"sft-1": "a" * 64, "dpo-1": "b" * 64}
JOBS = {
    "job-1": Ended(job_id="job-1", state="succeeded", reasons=["infra_lost", "completed"], digests=["a" * 64]),
    "job-2": Ended(job_id="job-2", state="succeeded", reasons=["completed"], digests=["b" * 64]),
}
ENOUGH = MIN_SAMPLES["median"]
AWAY = [Window(what="api", since=100.0, until=110.0), Window(what="database", since=200.0, until=205.0)]


def sample(what: str, at: float, *, seconds: float = 0.01, status: int = 200, **given: str) -> Sample:
    return Sample(what=what, at=at, seconds=seconds, status=status, **given)


SAMPLES = [
    sample("submit", 1.0, key="key-1", job_id="job-1"),
    sample("submit", 105.0, status=0, told="ConnectionRefusedError", key="key-2"),
    sample("submit", 201.0, status=503, retry_after="5", told="database_unavailable", key="key-2"),
    sample("submit", 206.0, key="key-2", job_id="job-2"),
    sample("get", 5.0),
]


def found(jobs: Mapping[str, Ended] = JOBS, *more: Sample) -> list[str]:
    return problems(SUBMITTED, [*SAMPLES, *more], jobs, DIGESTS, AWAY)


def changed(job_id: str, **values: object) -> dict[str, Ended]:
    return {**JOBS, job_id: replace(JOBS[job_id], **values)}  # pyright: ignore[reportArgumentType]


def test_a_seed_determines_the_faults() -> None:
    assert draw(7, seconds=600) == draw(7, seconds=600)
    assert draw(7, seconds=600) != draw(8, seconds=600)


def test_a_longer_storm_starts_with_the_faults_of_a_shorter_one() -> None:
    short, long = draw(7, seconds=60), draw(7, seconds=600)

    assert long[: len(short)] == short


def test_twenty_minutes_have_every_kind_of_fault_every_few_seconds() -> None:
    faults = draw(1, seconds=1200)

    gaps = [after.at - before.at for before, after in pairwise(faults)]
    assert {fault.kind for fault in faults} == KINDS.keys()
    assert all(2.0 <= gap <= 6.0 for gap in gaps)
    assert all(0.0 <= fault.place < 1.0 and fault.lasts >= 0.0 for fault in faults)
    assert {fault.failpoint for fault in faults} - {None} <= set(FAILPOINTS)


def test_every_kind_of_fault_has_an_action() -> None:
    assert [kind for kind in KINDS if not hasattr(Storm, f"_{kind.replace('-', '_')}")] == []


def test_every_job_of_a_soak_is_valid_and_unique() -> None:
    works = job_kinds.works(2)

    bodies = [
        job_kinds.with_ids(body, {"chats": "file-1", "pairs": "file-2", "valid": "file-3"}) for body in works.values()
    ]

    for body in bodies:
        JobRequest.model_validate(body)
    assert len(works) == len({str(body) for body in bodies}) == 2 * len(job_kinds.KINDS)


def test_jobs_that_end_once_with_their_undisturbed_bytes_are_no_problem() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        (changed("job-1", digests=["c" * 64]), "has the bytes cccc"),
        (changed("job-1", state="running", reasons=["infra_lost", None]), "is running"),
        (changed("job-1", state="failed", error={"message": "It was quarantined."}), "It was quarantined."),
        ({**JOBS, "job-3": JOBS["job-2"]}, "job-3: it exists, but no response named it"),
    ],
)
def test_wrong_digests_and_jobs_that_failed_or_that_no_response_named_are_found(
    jobs: dict[str, Ended], message: str
) -> None:
    (problem,) = found(jobs)

    assert message in problem


def test_a_job_quarantined_for_kills_is_no_problem() -> None:
    quarantined = {"state": "failed", "error": {"code": "quarantined", "message": "It was quarantined."}, "digests": []}
    killed = changed("job-1", **quarantined, crashes=[WAS_KILLED] * 3, reasons=["trainer_crashed"] * 3)
    other = changed("job-1", **quarantined, crashes=[WAS_KILLED, WAS_KILLED, "Memory ran out."])
    by_losses = changed("job-1", **quarantined, crashes=[WAS_KILLED] * 3, reasons=["trainer_crashed", "infra_lost"])

    assert found(killed) == []
    for wrong in (other, by_losses):
        assert ["was quarantined" in problem for problem in found(wrong)] == [True]


def test_only_ends_after_the_furthest_checkpoint_count_against_a_job() -> None:
    ends = [("trainer_crashed", 10.0), ("infra_lost", 30.0), ("trainer_crashed", 40.0), ("drained", 50.0)]
    attempts = [{"job_id": "job-1", "reason": reason, "detail": f"at {at}", "ended_at": at} for reason, at in ends]
    job = {"id": "job-1", "project_id": "ours", "state": "failed", "error": None}
    job_of_others = {"id": "job-3", "project_id": "theirs", "state": "cancelled", "error": None}
    of_own = [{"job_id": "job-1", "step": 20, "created_at": 20.0}, {"job_id": "job-1", "step": 17, "created_at": 45.0}]
    checkpoints = [*of_own, {"job_id": "job-2", "step": 30, "created_at": 60.0}]
    tables: dict[str, Any] = {"jobs": [job, job_of_others], "attempts": attempts, "checkpoints": checkpoints}

    found = ended({**tables, "adapters": [], "artifacts": []}, project_id="ours")

    assert list(found) == ["job-1"]
    assert found["job-1"].crashes == ["at 40.0"]


def test_a_key_without_a_job_is_found() -> None:
    without_key_2 = [each for each in SAMPLES if each.key != "key-2"]

    assert "key-2: no response named a job" in problems(SUBMITTED, without_key_2, JOBS, DIGESTS, AWAY)


@pytest.mark.parametrize(
    "answer",
    [
        sample("get", 203.0, status=500),
        sample("get", 203.0, status=503),
        sample("get", 50.0, status=503, retry_after="5"),
        sample("get", 203.0, status=0, told="ConnectionResetError"),
        sample("list", 50.0, status=404),
    ],
)
def test_unexplained_errors_of_a_running_api_server_are_found(answer: Sample) -> None:
    (problem,) = found(JOBS, answer)

    assert problem.startswith(f"{answer.what} at")


def test_a_request_of_an_operator_may_be_rejected_but_not_by_an_error() -> None:
    answers = [
        sample("pause", 50.0, status=409, told="job_not_running"),
        sample("uncordon", 209.0, status=503, retry_after="5"),
        sample("resume", 51.0, status=500, told="internal_error"),
    ]

    (problem,) = problems(SUBMITTED, SAMPLES, JOBS, DIGESTS, AWAY, of_operator=answers)

    assert problem.startswith("resume at 51.0: 500 internal_error")


def test_requests_during_an_outage_are_not_compared() -> None:
    calm = [sample("get", at, seconds=0.010) for at in (1.0, 2.0, 3.0)]
    storm = [sample("get", at, seconds=0.020) for at in (50.0, 60.0, 70.0)]
    away = [
        sample("get", 99.9, seconds=5.0),
        sample("get", 104.0, status=0, told="ConnectionRefusedError"),
        sample("get", 202.0, seconds=9.0, status=503, retry_after="5"),
    ]

    (requests,) = compare([*calm, *storm, *away], AWAY, usual=(0.0, 40.0), disturbed=(40.0, 300.0))

    assert (requests.usual.num, requests.disturbed.num) == (3, 3)
    assert (requests.ratio("median"), requests.ratio("p95")) == (2.0, 2.0)


@pytest.mark.parametrize(("num", "seconds", "message"), [(ENOUGH, 0.019, ""), (ENOUGH, 0.021, "2.10 times")])
def test_responses_slower_than_twice_the_usual_time_are_a_problem(num: int, seconds: float, message: str) -> None:
    found = slow(compared(num, seconds))

    assert [message in problem for problem in found] == ([True] if message else [])


def test_too_few_responses_to_compare_are_a_problem() -> None:
    (problem,) = slow(compared(ENOUGH - 1, 0.010))

    assert problem.startswith("no kind of request")
    assert slow([]) == [problem]


def compared(num: int, seconds: float) -> list[Compared]:
    """Compare quick undisturbed responses with responses of `seconds` during faults, one of which is very slow."""
    calm = [sample("get", float(at), seconds=0.010) for at in range(num)]
    storm = [sample("get", 50.0 + at, seconds=seconds) for at in range(num - 1)]
    return compare([*calm, *storm, sample("get", 90.0, seconds=9.0)], [], usual=(0.0, 40.0), disturbed=(40.0, 300.0))


def isolated(**changes: object) -> Isolated:
    """Return a good result with changes: two workers, fair shares."""
    disturbed = Stretch(gaps={"w1": 2.0, "w2": 4.9}, device_seconds={"ours": 46.0, "theirs": 54.0}, num_waiting=3)
    found = Isolated(project_id="ours", disturbed=disturbed, lease_seconds=15.0)
    for name, value in changes.items():
        setattr(found if hasattr(found, name) else found.disturbed, name, value)
    return found


def isolation_problems(found: Isolated, *, p99_seconds: float = 0.010, num: int = MIN_SAMPLES["p99"]) -> list[str]:
    alone = [sample("get", float(at) / num, seconds=0.010) for at in range(num)]
    disturbed = [sample("get", 50.0 + at / num, seconds=p99_seconds) for at in range(num)]
    return [*effects(found, compare([*alone, *disturbed], [], usual=(0.0, 40.0), disturbed=(40.0, 300.0)))]


def test_a_neighbor_without_effects_is_no_problem() -> None:
    assert isolation_problems(isolated()) == []
    assert isolation_problems(isolated(), p99_seconds=0.0199) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gaps": {"w1": 5.1}}, "5.1 s between two heartbeats"),
        ({"gaps": {}}, "no worker sent a heartbeat"),
        ({"num_waiting": 0}, "queue was empty"),
        ({"device_seconds": {"ours": 44.0, "theirs": 56.0}}, "got 44.0%"),
        ({"device_seconds": {"ours": 44.0}}, "the neighbor used no device"),
    ],
)
def test_each_effect_of_a_neighbor_is_found(changes: dict[str, object], message: str) -> None:
    (problem,) = isolation_problems(isolated(**changes))

    assert message in problem


def test_a_p99_above_twice_the_undisturbed_one_and_few_samples_are_found() -> None:
    (slow_problem,) = isolation_problems(isolated(), p99_seconds=0.021)
    (few,) = isolation_problems(isolated(), num=MIN_SAMPLES["p99"] - 1)

    assert "2.10 times as long" in slow_problem
    assert few.startswith("no kind of request")


def test_a_failpoint_kills_one_process_each_time_its_file_is_created(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    program = "from catalog import failpoints; failpoints.pass_by('here'); print('passed')"

    def passes() -> int:
        environment = {"FAILPOINT": f"elsewhere:kill,here:kill-if={gate}"}
        argv = [sys.executable, "-c", program]
        return subprocess.run(argv, env=environment, cwd=Path(__file__).parents[2], check=False).returncode

    before = passes()
    gate.touch()

    assert [before, passes(), passes()] == [0, -signal.SIGKILL, 0]
    assert not gate.exists()
