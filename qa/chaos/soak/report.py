"""The report of a soak: a table of findings with their goals, and the raw data of the results file."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import asdict

from benchmarks.results import Result, print_table
from qa.chaos.soak.assessment import MAX_RATIO, MAX_RENEWAL, MIN_SHARE, Isolated, is_put_aside_by_kills
from qa.chaos.soak.run import Soak
from tests.worker_site import ROOT

REQUESTS = {"get": "Read a job", "list": "List jobs", "submit": "Submit a job"}
SHOWN_PROBLEMS = 60


def show(soak: Soak, result: Result) -> None:
    for name, rows in result.repeats.items():
        if name not in ("problems", "latencies_ms"):
            print(
                f"{name}:", *(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows), sep="\n    "
            )
    print_table([result])
    problems = [row["sentence"] for row in result.repeats["problems"]]
    print("", *problems[:SHOWN_PROBLEMS], sep="\n    ")
    told = f"{len(problems) or 'no'} problems, {len(soak.findings)} of them found by the auditor"
    print(f"seed {soak.plan.seed}: {told}", flush=True)


def result_of(soak: Soak) -> Result:
    storm, jobs = soak.storm, soak.jobs.values()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    settings = {"commit": head.stdout.strip(), "works": len(soak.digests), "calm_jobs": soak.num_calm_jobs}
    result = Result(theme="soak", settings={**asdict(soak.plan), **settings})
    compared = soak.compare()
    names = sorted({*storm.injected, *storm.left_out})
    other = Counter(f"{each.what}: {each.status} {each.told}".strip() for each in soak.of_operator)
    result.repeats = {
        "faults": [{"fault": name, "done": storm.injected[name], "no_target": storm.left_out[name]} for name in names],
        "failpoints_not_passed": [{"name": name} for name in soak.not_passed],
        "latencies_ms": [asdict(each) for each in compared],
        "attempts_ended": [Counter(str(reason) for job in jobs for reason in job.reasons)],
        "states": [Counter(job.state for job in jobs)],
        "restarts": [storm.restarts],
        "responses_to_operator": [other],
        "problems": [{"sentence": one} for one in [*soak.problems, *map(str, soak.findings)]],
    }
    aside = sum(map(is_put_aside_by_kills, jobs))
    num_adapters = sum(len(job.digests) for job in jobs)
    result.find("Jobs submitted", len(soak.submitted), "")
    succeeded = sum(job.state == "succeeded" for job in jobs)
    result.find("Jobs that succeeded", succeeded, "", goal=len(soak.submitted) - aside)
    result.find("Jobs quarantined after repeated kills of their trainers", aside, "")
    result.find("Adapters", num_adapters, "", at_most=len(soak.submitted))
    result.find("Problems found by the soak", len(soak.problems), "", at_most=0)
    result.find("Problems found by the auditor", len(soak.findings), "", at_most=0)
    result.find("Received webhooks", len(soak.site.hooks), "")
    result.find("Injected faults", storm.injected.total(), "")
    for name, title in (("database", "Database"), ("api", "API server")):
        seconds = [(window.until or soak.stormy[1]) - window.since for window in storm.windows if window.what == name]
        result.find(f"{title} unavailable", sum(seconds), "s")
    result.find("From the last fault until all jobs had finished", soak.seconds_after, "s")
    for each in compared:
        for part in ("median", "p95"):
            name = f"{REQUESTS[each.what]}: {part} latency, during faults / undisturbed"
            result.find(name, each.ratio(part), "x", at_most=MAX_RATIO)
    if soak.isolated is not None:
        _add_isolation(result, soak, soak.isolated)
    return result


def _add_isolation(result: Result, soak: Soak, isolated: Isolated) -> None:
    """Add the effects of a noisy neighbor on an ordinary project."""
    statuses = sorted(isolated.statuses.items())
    result.repeats["neighbor_requests"] = [{"behavior": name, **counted} for name, counted in statuses]
    for each in soak.compare_isolated(isolated):
        limit = {"at_most": MAX_RATIO} if each.is_enough_for("p99") else {}
        request = REQUESTS[each.what]
        result.find(f"{request}: p99 latency, next to the noisy neighbor / alone", each.ratio("p99"), "x", **limit)
        result.find(f"{request}: p99 latency, alone", each.usual.p99, "ms")
    gap, near = "Longest time between two heartbeats", "next to the noisy neighbor"
    result.find(f"{gap}, alone", isolated.alone.longest_gap, "s")
    limit = isolated.lease_seconds * MAX_RENEWAL
    result.find(f"{gap}, {near}", isolated.disturbed.longest_gap, "s", at_most=limit)
    share = isolated.disturbed.share(isolated.project_id)
    result.find(f"Ordinary project's fraction of device-seconds, {near}", share, "", goal=0.5 * MIN_SHARE)
