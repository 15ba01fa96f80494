"""The report of a soak: a table of findings with their goals, the faults, and a results file."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.results import Result, print_table
from benchmarks.results import write as write_result
from qa.chaos.soak import assessment, isolation
from qa.chaos.soak.isolation import Isolated
from qa.chaos.soak.job_kinds import Undisturbed
from qa.chaos.soak.run import Plan, Soaked
from qa.chaos.soak.soak_faults import KINDS
from tests.worker_site import ROOT

REQUESTS = {"get": "Read a job", "list": "List jobs", "submit": "Submit a job"}
SHOWN_PROBLEMS = 60


def show(plan: Plan, seen: Soaked, result: Result) -> None:
    for name in sorted({*seen.done, *seen.left_out}):
        _say(
            f"{name}: {seen.done[name]} injected, {seen.left_out[name]} without a target; {KINDS[name.split()[0]].says}"
        )
    print_table([result])
    _say(f"restarts: {_counted(seen.started)}; uncordoned by the operator: {seen.num_uncordoned} workers")
    _say(f"responses to the operator other than 200: {_counted(seen.refusals)}")
    _say(f"received webhooks: {seen.num_hooks}")
    _say(f"failpoints that no process passed: {', '.join(seen.not_passed) or 'none'}")
    _say(f"attempts ended: {_counted(_reasons(seen))}")
    _say(f"states: {_counted(Counter(job.state for job in seen.jobs.values()))}")
    if seen.isolated is not None:
        for name, counted in sorted(seen.isolated.statuses.items()):
            _say(f"neighbor, {name}: {_counted(counted)}")
    for problem in [*seen.problems, *map(str, seen.findings)][:SHOWN_PROBLEMS]:
        _say(f"    {problem}")
    num = len(seen.problems) + len(seen.findings)
    _say(f"seed {plan.seed}: {num or 'no'} problems, {len(seen.findings)} of them found by the auditor")


def result_of(plan: Plan, seen: Soaked, undisturbed: Undisturbed) -> Result:
    settings = {**asdict(plan), "commit": _commit(), "works": len(undisturbed.digests), "calm_jobs": seen.num_calm_jobs}
    result = Result(theme="soak", settings=settings)
    compared = assessment.compare(seen.samples, seen.windows, calm=seen.calm, storm=seen.storm)
    names = sorted({*seen.done, *seen.left_out})
    result.repeats = {
        "faults": [{"fault": name, "done": seen.done[name], "met_nobody": seen.left_out[name]} for name in names],
        "latencies_ms": [_request(each) for each in compared],
        "attempts_ended": [dict(_reasons(seen))],
        "started_again": [dict(seen.started)],
        "refused_to_operator": [dict(seen.refusals)],
        "problems": [{"sentence": one} for one in [*seen.problems, *map(str, seen.findings)]],
    }
    succeeded = sum(job.state == "succeeded" for job in seen.jobs.values())
    aside = sum(assessment.is_put_aside_by_kills(job) for job in seen.jobs.values())
    digests = [digest for job in seen.jobs.values() for digest in job.digests]
    result.find("Jobs submitted", len(seen.submitted), "")
    result.find("Jobs that succeeded", succeeded, "", goal=len(seen.submitted) - aside)
    result.find("Jobs quarantined after repeated kills of their trainers", aside, "")
    result.find("Adapters", len(digests), "", at_most=len(seen.submitted))
    result.find("Problems found by the soak", len(seen.problems), "", at_most=0)
    result.find("Problems found by the auditor", len(seen.findings), "", at_most=0)
    result.find("Injected faults", seen.done.total(), "")
    for name, title in (("database", "Database"), ("api", "API server")):
        seconds = [(window.until or seen.storm[1]) - window.since for window in seen.windows if window.what == name]
        result.find(f"{title} unavailable", sum(seconds), "s")
    result.find("From the last fault until all jobs had finished", seen.seconds_after, "s")
    for each in compared:
        for part in ("median", "p95"):
            name = f"{REQUESTS[each.what]}: {part} latency, during faults / undisturbed"
            result.find(name, each.ratio(part), "x", at_most=assessment.MAX_RATIO)
    if seen.isolated is not None:
        _add_isolation(result, seen, seen.isolated)
    return result


def write(result: Result, folder: Path, *, note: str | None, load_before: float) -> Path:
    return write_result(result, folder, note=note, load_before=load_before, module="qa.chaos.soak")


def _add_isolation(result: Result, seen: Soaked, isolated: Isolated) -> None:
    """Add the effects of a noisy neighbor on an ordinary project."""
    result.repeats["neighbor_requests"] = [
        {"behavior": name, **counted} for name, counted in sorted(isolated.statuses.items())
    ]
    for each in seen.compare_isolated():
        is_enough = min(each.calm.num, each.storm.num) >= isolation.MIN_SAMPLES
        limit = {"at_most": isolation.MAX_RATIO} if is_enough else {}
        request = REQUESTS[each.what]
        result.find(f"{request}: p99 latency, next to the noisy neighbor / alone", each.ratio("p99"), "x", **limit)
        result.find(f"{request}: p99 latency, alone", each.calm.p99, "ms")
    gap, near = "Longest time between two heartbeats", "next to the noisy neighbor"
    result.find(f"{gap}, alone", isolated.alone.longest_gap, "s")
    limit = isolated.lease_seconds * isolation.MAX_RENEWAL
    result.find(f"{gap}, {near}", isolated.disturbed.longest_gap, "s", at_most=limit)
    share = isolated.disturbed.share(isolated.project_id)
    name = f"Ordinary project's fraction of device-seconds, {near}"
    result.find(name, share, "", goal=0.5 * isolation.MIN_SHARE)


def _request(each: assessment.Compared) -> dict[str, object]:
    stretches = {"undisturbed": asdict(each.calm), "amid_faults": asdict(each.storm)}
    return {"request": each.what, **stretches, "answers_while_away": {what: dict(n) for what, n in each.away.items()}}


def _reasons(seen: Soaked) -> Counter[str]:
    return Counter(str(reason) for job in seen.jobs.values() for reason in job.reasons)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counter.most_common()) or "none"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
