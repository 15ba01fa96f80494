"""The pieces of a soak, without one: what chance draws, and that its judge finds what is planted in a good record."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from catalog.spec.job import JobRequest
from qa.chaos.audit.tables import Record
from qa.chaos.soak import fault_schedule, isolation, job_kinds
from qa.chaos.soak.assessment import MIN_SAMPLES, Compared, Ended, compare, ended, problems, refusals, slow
from qa.chaos.soak.fault_injection import Acts
from qa.chaos.soak.isolation import Isolated, Stretch
from qa.chaos.soak.job_kinds import Files
from qa.chaos.soak.load_client import Sample
from qa.chaos.soak.process_keeper import Window
from worker.process.exit_status import WAS_KILLED

SUBMITTED = {"key-1": "sft-1", "key-2": "dpo-1"}
DIGESTS = {"sft-1": "a" * 64, "dpo-1": "b" * 64}
JOBS = {
    "job-1": Ended(job_id="job-1", state="succeeded", reasons=["infra_lost", "completed"], digests=["a" * 64]),
    "job-2": Ended(job_id="job-2", state="succeeded", reasons=["completed"], digests=["b" * 64]),
}
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


def test_a_seed_draws_the_same_faults_each_time_and_another_seed_draws_others() -> None:
    assert fault_schedule.draw(7, seconds=600) == fault_schedule.draw(7, seconds=600)
    assert fault_schedule.draw(7, seconds=600) != fault_schedule.draw(8, seconds=600)


def test_a_longer_storm_begins_as_a_shorter_one() -> None:
    short, long = fault_schedule.draw(7, seconds=60), fault_schedule.draw(7, seconds=600)

    assert long[: len(short)] == short


def test_twenty_minutes_bring_every_kind_of_fault_one_every_few_seconds() -> None:
    faults = fault_schedule.draw(1, seconds=1200)

    gaps = [after.at - before.at for before, after in pairwise(faults)]
    assert {fault.kind for fault in faults} == set(get_args(fault_schedule.FaultKind))
    assert all(2.0 <= gap <= 6.0 for gap in gaps)
    assert all(0.0 <= fault.place < 1.0 and fault.lasts >= 0.0 for fault in faults)
    assert {fault.failpoint for fault in faults} - {None} <= set(fault_schedule.FAILPOINTS)


def test_every_kind_of_fault_is_told_has_a_weight_and_can_be_done() -> None:
    assert set(fault_schedule.SAYS) == set(fault_schedule.WEIGHTS) == set(fault_schedule.FAULT_KINDS)
    assert [kind for kind in fault_schedule.FAULT_KINDS if not hasattr(Acts, f"_{kind.replace('-', '_')}")] == []


def test_every_job_of_a_soak_is_one_that_lorry_takes_and_no_two_works_are_alike() -> None:
    files, works = Files(chats="file-1", pairs="file-2", valid="file-3"), job_kinds.works(2)

    bodies = [job_kinds.fields(work, files) for work in works]

    for body in bodies:
        JobRequest.model_validate({"model": "tiny", "training_file": "file-1", **body})
    assert len({work.name for work in works}) == len({str(body) for body in bodies}) == 2 * len(job_kinds.KINDS)


def test_nothing_is_found_where_all_jobs_ended_once_with_the_bytes_of_their_undisturbed_run() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        (changed("job-1", digests=["c" * 64]), "has the bytes cccc"),
        (changed("job-1", state="running", reasons=["infra_lost", None]), "is running"),
        (changed("job-1", state="failed", error={"message": "It was put aside."}), "It was put aside."),
        (changed("job-2", reasons=["completed", "completed"]), "was completed 2 times"),
        (changed("job-2", digests=["b" * 64, "b" * 64]), "with 2 adapters"),
        ({"job-1": JOBS["job-1"]}, "job-2 was accepted, but does not exist"),
        ({**JOBS, "job-3": JOBS["job-2"]}, "job-3: it exists, but no response named it"),
    ],
)
def test_a_wrong_digest_a_missing_end_a_doubled_and_a_lost_job_are_found(jobs: dict[str, Ended], says: str) -> None:
    (problem,) = found(jobs)

    assert says in problem


def test_a_job_that_was_put_aside_for_kills_is_no_problem_once_its_work_is_done_under_another_key() -> None:
    put_aside = {"state": "failed", "error": {"code": "quarantined", "message": "It was put aside."}, "digests": []}
    killed = changed("job-1", **put_aside, crashes=[WAS_KILLED] * 3, reasons=["trainer_crashed"] * 3)
    other = changed("job-1", **put_aside, crashes=[WAS_KILLED, WAS_KILLED, "Memory ran out."])
    by_losses = changed("job-1", **put_aside, crashes=[WAS_KILLED] * 3, reasons=["trainer_crashed", "infra_lost"])
    job_again = replace(JOBS["job-1"], job_id="job-3")
    asked_again = sample("submit", 300.0, key="again-key-1", job_id="job-3")

    def found_again(jobs: Mapping[str, Ended]) -> list[str]:
        submitted = {**SUBMITTED, "again-key-1": "sft-1"}
        return problems(submitted, [*SAMPLES, asked_again], {**jobs, "job-3": job_again}, DIGESTS, AWAY)

    assert found_again(killed) == []
    assert ["put aside" in problem for problem in found(killed)] == [True], "it was not asked for again"
    for wrong in (other, by_losses):
        assert ["put aside" in problem for problem in found_again(wrong)] == [True]


def test_only_what_came_after_the_furthest_checkpoint_counts_against_a_job() -> None:
    ends = [("trainer_crashed", 10.0), ("infra_lost", 30.0), ("trainer_crashed", 40.0), ("drained", 50.0)]
    attempts = [{"reason": reason, "detail": f"at {at}", "ended_at": at} for reason, at in ends]
    empty = {one.name: [] for one in fields(Record)}
    job = {"id": "job-1", "project_id": "ours", "state": "failed", "error": None}
    job_of_others = {"id": "job-3", "project_id": "theirs", "state": "cancelled", "error": None}
    of_own = [{"job_id": "job-1", "step": 20, "created_at": 20.0}, {"job_id": "job-1", "step": 17, "created_at": 45.0}]
    checkpoints = [*of_own, {"job_id": "job-2", "step": 30, "created_at": 60.0}]
    record = {**empty, "jobs": [job, job_of_others], "attempts": {"job-1": attempts}, "checkpoints": checkpoints}

    found = ended(Record(**record), project_id="ours")  # pyright: ignore[reportArgumentType]

    assert list(found) == ["job-1"]
    assert found["job-1"].crashes == ["at 40.0"]


def test_a_key_that_was_answered_with_two_jobs_or_none_is_found() -> None:
    twice = sample("submit", 7.0, key="key-1", job_id="job-2")
    asked = [each for each in SAMPLES if each.key != "key-2"]

    assert "key-1: responses named 2 jobs" in found(JOBS, twice)
    assert "key-2: responses named 0 jobs" in problems(SUBMITTED, asked, JOBS, DIGESTS, AWAY)


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
def test_a_500_a_503_without_advice_or_reason_and_no_answer_of_an_api_that_lives_are_found(answer: Sample) -> None:
    (problem,) = found(JOBS, answer)

    assert problem.startswith(f"{answer.what} at")


def test_an_operator_may_be_refused_but_not_by_a_fault() -> None:
    answers = [
        sample("pause", 50.0, status=409, told="job_not_running"),
        sample("uncordon", 209.0, status=503, retry_after="5"),
        sample("resume", 51.0, status=500, told="internal_error"),
    ]

    (problem,) = problems(SUBMITTED, SAMPLES, JOBS, DIGESTS, AWAY, of_operator=answers)

    assert problem.startswith("resume at 51.0: 500 internal_error")
    assert refusals([*answers, sample("pause", 5.0)])["pause: 409 job_not_running"] == 1


def test_requests_while_the_api_or_its_database_is_away_are_counted_apart() -> None:
    calm = [sample("get", at, seconds=0.010) for at in (1.0, 2.0, 3.0)]
    storm = [sample("get", at, seconds=0.020) for at in (50.0, 60.0, 70.0)]
    away = [
        sample("get", 99.9, seconds=5.0),
        sample("get", 104.0, status=0, told="ConnectionRefusedError"),
        sample("get", 202.0, seconds=9.0, status=503, retry_after="5"),
    ]

    (told,) = compare([*calm, *storm, *away], AWAY, calm=(0.0, 40.0), storm=(40.0, 300.0))

    assert (told.calm.num, told.storm.num, told.ratio("median"), told.ratio("p95")) == (3, 3, 2.0, 2.0)
    assert told.away["api"] == {"200": 1, "none (ConnectionRefusedError)": 1}
    assert told.away["database"] == {"503 with Retry-After": 1}


@pytest.mark.parametrize(("num", "seconds", "says"), [(MIN_SAMPLES, 0.019, ""), (MIN_SAMPLES, 0.021, "2.10 times")])
def test_answers_that_take_more_than_twice_their_usual_time_are_a_problem(num: int, seconds: float, says: str) -> None:
    found = slow(compared(num, seconds))

    assert [says in problem for problem in found] == ([True] if says else [])


def test_a_soak_of_too_few_answers_to_be_compared_is_no_good_one() -> None:
    (problem,) = slow(compared(MIN_SAMPLES - 1, 0.010))

    assert problem.startswith("no kind of request")
    assert slow([]) == [problem]


def compared(num: int, seconds: float) -> list[Compared]:
    """As many quick answers undisturbed, and amid faults those that took so long, with one that took ages."""
    calm = [sample("get", float(at), seconds=0.010) for at in range(num)]
    storm = [sample("get", 50.0 + at, seconds=seconds) for at in range(num - 1)]
    return compare([*calm, *storm, sample("get", 90.0, seconds=9.0)], [], calm=(0.0, 40.0), storm=(40.0, 300.0))


def isolated(**changes: object) -> Isolated:
    """A good result: two workers, fair shares, no cordon."""
    disturbed = Stretch(gaps={"w1": 2.0, "w2": 4.9}, device_seconds={"ours": 46.0, "theirs": 54.0}, num_waiting=3)
    found = Isolated(project_id="ours", disturbed=disturbed, num_crashes=2, lease_seconds=15.0)
    for name, value in changes.items():
        setattr(found if hasattr(found, name) else found.disturbed, name, value)
    return found


def isolation_problems(found: Isolated, *, p99_seconds: float = 0.010, num: int = isolation.MIN_SAMPLES) -> list[str]:
    alone = [sample("get", float(at) / num, seconds=0.010) for at in range(num)]
    disturbed = [sample("get", 50.0 + at / num, seconds=p99_seconds) for at in range(num)]
    return [*isolation.problems(found, compare([*alone, *disturbed], [], calm=(0.0, 40.0), storm=(40.0, 300.0)))]


def test_a_neighbor_that_nobody_notices_is_no_problem() -> None:
    assert isolation_problems(isolated()) == []
    assert isolation_problems(isolated(), p99_seconds=0.0199) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gaps": {"w1": 5.1}}, "5.1 s between two heartbeats"),
        ({"gaps": {}}, "no worker sent a heartbeat"),
        ({"num_cordons": 1}, "1 workers were cordoned"),
        ({"num_crashes": 0}, "no trainer crashed"),
        ({"num_waiting": 0}, "queue was empty"),
        ({"device_seconds": {"ours": 44.0, "theirs": 56.0}}, "got 44.0%"),
        ({"device_seconds": {"ours": 44.0}}, "the neighbor used no device"),
    ],
)
def test_each_thing_that_tenants_notice_of_a_neighbor_is_found(changes: dict[str, object], says: str) -> None:
    (problem,) = isolation_problems(isolated(**changes))

    assert says in problem


def test_a_p99_of_more_than_twice_the_undisturbed_one_is_found_and_too_few_samples_are() -> None:
    (slow_problem,) = isolation_problems(isolated(), p99_seconds=0.021)
    (few,) = isolation_problems(isolated(), num=isolation.MIN_SAMPLES - 1)

    assert "2.10 times as long" in slow_problem
    assert few.startswith("no kind of request")


def test_a_failpoint_kills_one_process_each_time_that_its_file_is_made(tmp_path: Path) -> None:
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
