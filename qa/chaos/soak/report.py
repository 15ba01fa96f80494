"""The report of a soak: tables for users, and a results file."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.results import Result
from benchmarks.results import write as write_result
from qa.chaos.soak import assessment, fault_schedule, isolation
from qa.chaos.soak.isolation import Isolated
from qa.chaos.soak.job_kinds import Undisturbed
from qa.chaos.soak.run import Plan, Soaked
from tests.worker_site import ROOT

REQUESTS = {"get": "Read a job", "list": "List jobs", "submit": "Submit a job"}
SHOWN_PROBLEMS = 60


def of_works(undisturbed: Undisturbed) -> None:
    for name, digest in undisturbed.digests.items():
        _say(f"alone {name:16} {undisturbed.seconds[name]:5.1f} s  {digest}")


def of_run(plan: Plan, seen: Soaked) -> None:
    _say(f"\n{_faults_table(seen)}")
    _say(f"\n{_latency_table(seen)}")
    if seen.isolated is not None:
        _say(f"\n{_isolation_table(seen)}")
    for what in ("database", "api"):
        seconds = [(window.until or seen.storm[1]) - window.since for window in seen.windows if window.what == what]
        longest = max(seconds, default=0.0)
        _say(f"{what} unavailable: {len(seconds)} times, {sum(seconds):.0f} s in total, {longest:.1f} s at most")
    _say(f"restarts: {_counted(seen.started)}; uncordoned by the operator: {seen.num_uncordoned} workers")
    _say(f"responses to the operator other than 200: {_counted(seen.refusals)}")
    _say(f"received webhooks: {seen.num_hooks}")
    _say(f"failpoints that no process passed: {', '.join(seen.not_passed) or 'none'}")
    _say(f"truncated checkpoint files: {seen.num_truncated}, of them restored by the soak: {seen.num_put_back}")
    _say(f"attempts ended: {_counted(_reasons(seen))}")
    _say(f"states: {_counted(Counter(job.state for job in seen.jobs.values()))}")
    aside = sum(assessment.is_put_aside_by_kills(job) for job in seen.jobs.values())
    _say(f"quarantined after repeated kills of their trainers, as expected, and submitted again: {aside} jobs")
    _say(f"{seen.seconds_after:.0f} s from the last fault until every job had finished")
    for problem in [*seen.problems, *map(str, seen.findings)][:SHOWN_PROBLEMS]:
        _say(f"    {problem}")
    num = len(seen.problems) + len(seen.findings)
    _say(f"seed {plan.seed}: {num or 'no'} problems, {len(seen.findings)} of them found by the auditor")


def write(
    plan: Plan, seen: Soaked, undisturbed: Undisturbed, folder: Path, *, note: str | None, load_before: float
) -> Path:
    settings = {**asdict(plan), "commit": _commit(), "works": len(undisturbed.digests), "calm_jobs": seen.num_calm_jobs}
    result = Result(theme="soak", settings=settings)
    result.repeats = {
        "faults": [_fault(name, seen) for name in _names(seen)],
        "latencies_ms": [_request(each) for each in _compared(seen)],
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
    result.find("Jobs quarantined after repeated kills of their trainers, and submitted again", aside, "")
    result.find("Adapters", len(digests), "", at_most=len(seen.submitted))
    result.find("Problems found by the soak", len(seen.problems), "", at_most=0)
    result.find("Problems found by the auditor", len(seen.findings), "", at_most=0)
    result.find("Injected faults", seen.done.total(), "")
    for name, title in (("database", "Database"), ("api", "API server")):
        seconds = [(window.until or seen.storm[1]) - window.since for window in seen.windows if window.what == name]
        result.find(f"{title} unavailable", sum(seconds), "s")
    result.find("From the last fault until all jobs had finished", seen.seconds_after, "s")
    for each in _compared(seen):
        for part in ("median", "p95"):
            name = f"{REQUESTS[each.what]}: {part} latency, during faults / undisturbed"
            result.find(name, each.ratio(part), "x", at_most=assessment.MAX_RATIO)
    if seen.isolated is not None:
        _add_isolation(result, seen, seen.isolated)
    return write_result(result, folder, note=note, load_before=load_before, module="qa.chaos.soak")


def _add_isolation(result: Result, seen: Soaked, isolated: Isolated) -> None:
    """Add the effects of a noisy neighbor on an ordinary project."""
    result.repeats["neighbor_requests"] = [
        {"behavior": name, **counted} for name, counted in sorted(isolated.statuses.items())
    ]
    for each in seen.compare_isolated():
        is_enough = min(each.calm.num, each.storm.num) >= isolation.MIN_SAMPLES
        limit = {"at_most": isolation.MAX_RATIO} if is_enough else {}
        result.find(
            f"{REQUESTS[each.what]}: p99 latency, next to the noisy neighbor / alone", each.ratio("p99"), "x", **limit
        )
        result.find(f"{REQUESTS[each.what]}: p99 latency, alone", each.calm.p99, "ms")
    renewal = isolated.lease_seconds * isolation.MAX_RENEWAL
    result.find("Longest time between two heartbeats, alone", isolated.alone.longest_gap, "s")
    result.find(
        "Longest time between two heartbeats, next to the noisy neighbor",
        isolated.disturbed.longest_gap,
        "s",
        at_most=renewal,
    )
    result.find("Cordoned workers, next to the noisy neighbor", isolated.num_cordons, "", at_most=0)
    result.find("Trainers that crashed because of the neighbor's jobs", isolated.num_crashes, "")
    share = isolated.disturbed.share(isolated.project_id)
    result.find(
        "Ordinary project's fraction of device-seconds, next to the noisy neighbor",
        share,
        "",
        goal=0.5 * isolation.MIN_SHARE,
    )


def _isolation_table(seen: Soaked) -> str:
    assert seen.isolated is not None
    names = ("Alone: n, median, p95, p99 (ms)", "Next to the neighbor", "Median", "p95", "p99")
    lines = [f"| Request | {' | '.join(names)} |", "| --- | --- | --- | --- | --- | --- |"]
    for each in seen.compare_isolated():
        both = (each.calm, each.storm)
        stretches = [f"{one.num}, {one.median:.1f}, {one.p95:.1f}, {one.p99:.1f}" for one in both]
        ratios = [f"{each.ratio(part):.2f}x" for part in ("median", "p95", "p99")]
        lines.append(f"| {' | '.join([each.what, *stretches, *ratios])} |")
    found = seen.isolated
    gaps = f"{found.alone.longest_gap:.2f} s alone, {found.disturbed.longest_gap:.2f} s next to the neighbor"
    lines += ["", f"longest time between two heartbeats: {gaps}; a lease is {found.lease_seconds:g} s"]
    share = found.disturbed.share(found.project_id)
    lines.append(f"share of the device-seconds: {share:.1%}; {found.num_crashes} crashes, {found.num_cordons} cordons")
    for name, counted in sorted(found.statuses.items()):
        lines.append(f"neighbor, {name}: {_counted(Counter(counted))}")
    return "\n".join(lines)


def _compared(seen: Soaked) -> list[assessment.Compared]:
    return assessment.compare(seen.samples, seen.windows, calm=seen.calm, storm=seen.storm)


def _names(seen: Soaked) -> list[str]:
    return sorted({*seen.done, *seen.left_out})


def _fault(name: str, seen: Soaked) -> dict[str, str | int]:
    return {"fault": name, "done": seen.done[name], "met_nobody": seen.left_out[name]}


def _request(each: assessment.Compared) -> dict[str, object]:
    stretches = {"undisturbed": asdict(each.calm), "amid_faults": asdict(each.storm)}
    return {"request": each.what, **stretches, "answers_while_away": {what: dict(n) for what, n in each.away.items()}}


def _faults_table(seen: Soaked) -> str:
    lines = ["| Fault | What | Done | No target |", "| --- | --- | --- | --- |"]
    for name in _names(seen):
        says = next(said for kind, said in fault_schedule.SAYS.items() if kind == name.split()[0])
        lines.append(f"| {name} | {says} | {seen.done[name]} | {seen.left_out[name]} |")
    lines.append(f"| all | | {seen.done.total()} | {seen.left_out.total()} |")
    return "\n".join(lines)


def _latency_table(seen: Soaked) -> str:
    names = ("Undisturbed: n, median, p95, longest (ms)", "With faults", "Median", "p95", "Database down", "API down")
    lines = [f"| Request | {' | '.join(names)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for each in _compared(seen):
        both = (each.calm, each.storm)
        stretches = [f"{one.num}, {one.median:.1f}, {one.p95:.1f}, {one.longest:.0f}" for one in both]
        ratios = [f"{each.ratio(part):.2f}x" for part in ("median", "p95")]
        away = [_counted(each.away[what]) for what in ("database", "api")]
        lines.append(f"| {' | '.join([each.what, *stretches, *ratios, *away])} |")
    return "\n".join(lines)


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
