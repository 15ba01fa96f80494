"""A soak from beginning to end: a calm stretch, a storm of faults, and the time until all jobs have finished."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from catalog.errors import LorryError
from catalog.states import FINAL_STATES
from catalog.tables.jobs import Job
from qa.chaos.audit import tables
from qa.chaos.audit.findings import Finding
from qa.chaos.faults.processes import add_endpoint, all_delivered
from qa.chaos.service import BASE, FaultSite
from qa.chaos.soak import assessment, isolation, job_kinds
from qa.chaos.soak.isolation import Isolated, Neighborhood
from qa.chaos.soak.job_kinds import Files, Undisturbed, Work
from qa.chaos.soak.process_keeper import Kept, Window
from qa.chaos.soak.soak_faults import Acts, draw
from qa.chaos.soak.tenants import Sample, read_samples
from tests.api.hook_receiver import Answer, Received, receiving
from tests.worker_site import ROOT

TICK_SECONDS = 0.1
TELL_SECONDS = 30.0
WARM_SECONDS = 45.0
"""The first part of the calm stretch, which is not measured, because workers start and load."""
OVERLOAD = 2.0
"""Rate of submissions in the stretches with and without a neighbor, relative to the storm."""
SUBMITTED_BY = 0.95
"""Fraction of the storm in which the jobs are submitted, at a constant rate. The calm stretch has the same rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    seed: int
    minutes: float
    calm_minutes: float
    isolation_minutes: float
    """Length of each of the two stretches with equal load, alone and next to a noisy neighbor. 0: no such stretches."""
    patience_minutes: float
    """Time limit after the storm for all jobs to finish."""
    num_jobs: int
    num_workers: int

    @property
    def every(self) -> float:
        """Seconds between two submissions."""
        return self.minutes * 60 * SUBMITTED_BY / self.num_jobs


@dataclass(kw_only=True, slots=True)
class Soaked:
    """The observations of a soak."""

    submitted: dict[str, str] = field(default_factory=dict[str, str])
    samples: list[Sample] = field(default_factory=list[Sample])
    windows: list[Window] = field(default_factory=list[Window])
    calm: tuple[float, float] = (0.0, 0.0)
    storm: tuple[float, float] = (0.0, 0.0)
    isolated: Isolated | None = None
    num_calm_jobs: int = 0
    seconds_after: float = 0.0
    """Time from the last fault until every job had finished."""
    done: Counter[str] = field(default_factory=Counter[str])
    left_out: Counter[str] = field(default_factory=Counter[str])
    refusals: Counter[str] = field(default_factory=Counter[str])
    started: Counter[str] = field(default_factory=Counter[str])
    not_passed: list[str] = field(default_factory=list[str])
    num_uncordoned: int = 0
    num_hooks: int = 0
    """Received webhooks."""
    jobs: dict[str, assessment.Ended] = field(default_factory=dict[str, assessment.Ended])
    problems: list[str] = field(default_factory=list[str])
    findings: Sequence[Finding] = ()

    def compare_isolated(self) -> list[assessment.Compared]:
        """Compare the requests of the ordinary project, alone and next to the noisy neighbor."""
        assert self.isolated is not None
        alone, disturbed = self.isolated.alone, self.isolated.disturbed
        stretches = {"calm": (alone.since, alone.until), "storm": (disturbed.since, disturbed.until)}
        return assessment.compare(self.samples, self.windows, **stretches)


class Soak:
    def __init__(self, site: FaultSite, plan: Plan, undisturbed: Undisturbed, works: list[Work]) -> None:
        self.site = site
        self.plan = plan
        self.undisturbed = undisturbed
        self.works = works
        self.seen = Soaked()
        self.kept = Kept(site, plan.num_workers)
        self.acts = Acts(site, self.kept)
        self._told_at = time.monotonic()

    def run(self) -> Soaked:
        with receiving() as receiver:
            receiver.answer = self._told
            add_endpoint(self.site, receiver.url)
            return self._run()

    def _told(self, request: Received) -> Answer:
        """Note a received webhook."""
        self.site.heard(request.body, event_id=request.headers["webhook-id"])
        return Answer()

    def _run(self) -> Soaked:
        path = self.site.folder / "samples.jsonl"
        self._while(lambda: self.kept.is_away("api"))
        files = job_kinds.upload(self.site)
        asking = self._start_asking(path)
        self._calm(asking, files)
        if self.plan.isolation_minutes:
            self._isolate(asking, files)
        self._storm(asking, files)
        self._rest(path)
        assert asking.stdin is not None
        asking.stdin.close()
        assert asking.wait(120) == 0, self.site.log()
        self._judge(path)
        return self.seen

    # The three stretches

    def _calm(self, asking: subprocess.Popen[str], files: Files) -> None:
        seconds = self.plan.calm_minutes * 60
        self.seen.num_calm_jobs = max(1, int(seconds / self.plan.every))
        self._submit(asking, files, "calm", self.seen.num_calm_jobs)
        began = time.time()
        self._while(lambda: time.time() < began + seconds)
        self.seen.calm = (began + min(WARM_SECONDS, seconds / 3), time.time())

    def _isolate(self, asking: subprocess.Popen[str], files: Files) -> None:
        """Run both stretches, alone and next to a noisy neighbor, each with more jobs than the workers finish."""
        near, seconds = Neighborhood(self.site, self._while), self.plan.isolation_minutes * 60
        number, every = int(seconds / (self.plan.every / OVERLOAD)), self.plan.every / OVERLOAD
        stretch = {"seconds": seconds, "warm_seconds": min(WARM_SECONDS, seconds / 3)}
        with near.separate_machines(self.kept.workers):
            self._submit(asking, files, "alone", number, every=every)
            near.measure(near.found.alone, **stretch)
            self._submit(asking, files, "disturbed", number, every=every)
            with near.neighbor():
                near.measure(near.found.disturbed, **stretch)
        self.seen.isolated = near.found

    def _storm(self, asking: subprocess.Popen[str], files: Files) -> None:
        self._submit(asking, files, "storm", self.plan.num_jobs)
        began, began_at = time.monotonic(), time.time()
        seconds = self.plan.minutes * 60
        for fault in draw(self.plan.seed, seconds=seconds):
            self._while(lambda due=began + fault.at: time.monotonic() < due)
            self.acts.do(fault)
        self._while(lambda: time.monotonic() < began + seconds)
        self.seen.storm = (began_at, time.time())

    def _rest(self, path: Path) -> None:
        """Wait until everything is finished, without further faults."""
        began = time.monotonic()
        while not self.acts.is_over:
            self.acts.tick(at_once=True)
            self._tick()
        self.seen.not_passed = self.acts.disarm()
        patience = self.plan.patience_minutes * 60
        self._while(lambda: time.monotonic() < began + patience and not self._is_done(path))
        self.seen.seconds_after = time.monotonic() - began

    def _is_done(self, path: Path) -> bool:
        time.sleep(1.0)
        keys = {sample.key for sample in read_samples(path) if sample.job_id is not None}
        states = self._states()
        is_ended = keys == set(self.seen.submitted) and set(states) <= FINAL_STATES and bool(states)
        return is_ended and all_delivered(self.site)

    def _judge(self, path: Path) -> None:
        seen = self.seen
        seen.samples, seen.windows = read_samples(path), self.kept.windows
        seen.done, seen.left_out, seen.started = self.acts.done, self.acts.left_out, self.kept.started
        of_operator = [*self.acts.answers, *self.kept.answers]
        seen.refusals = assessment.refusals(of_operator)
        seen.num_uncordoned = sum(sample.status == HTTPStatus.OK for sample in self.kept.answers)
        seen.num_hooks = len(self.site.hooks)
        for sample in seen.samples:
            if sample.key is not None and sample.job_id is not None:
                self.site.submissions[sample.key].append(sample.job_id)
        seen.jobs = self._ended()
        args = (seen.submitted, seen.samples, seen.jobs, self.undisturbed.digests, seen.windows)
        compared = assessment.compare(seen.samples, seen.windows, calm=seen.calm, storm=seen.storm)
        slow = assessment.slow(compared)
        if seen.isolated is not None:
            slow += isolation.problems(seen.isolated, seen.compare_isolated())
        seen.problems = [*assessment.problems(*args, of_operator=of_operator), *self.acts.failures, *slow]
        if not seen.num_hooks or not seen.done:
            seen.problems.append(f"{seen.done.total()} faults were injected, and {seen.num_hooks} webhooks came")
        self.site.stop()
        seen.findings = self.site.audit()

    # Continuous actions

    def _while(self, condition: Callable[[], object]) -> None:
        while condition():
            self._tick()
            time.sleep(TICK_SECONDS)

    def _tick(self) -> None:
        self.acts.tick()
        self.kept.tick()
        if time.monotonic() - self._told_at > TELL_SECONDS:
            self._told_at = time.monotonic()
            states = ", ".join(f"{number} {state}" for state, number in sorted(self._states().items()))
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {self.acts.done.total()} faults; {states}\n")
            sys.stdout.flush()

    def _ended(self) -> dict[str, assessment.Ended]:
        found = tables.read(self.site.settings.resolved_database_url())
        return assessment.ended(found, project_id=self.site.caller.project_id)

    def _states(self) -> dict[str, int]:
        try:
            with self.site.db.read() as session:
                return dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).tuples().all())
        except LorryError:
            return {}

    # The client

    def _start_asking(self, path: Path) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "qa.chaos.soak.tenants", "ordinary", self.site.url, self.site.key, str(path)]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, text=True, cwd=ROOT)

    def _submit(
        self, asking: subprocess.Popen[str], files: Files, stretch: str, number: int, *, every: float | None = None
    ) -> None:
        works = [self.works[count % len(self.works)] for count in range(number)]
        keys = [f"{stretch}-{count}-{work.name}" for count, work in enumerate(works)]
        orders = [self._order(key, work, files) for key, work in zip(keys, works, strict=True)]
        self._send(asking, orders, every=every)

    def _order(self, key: str, work: Work, files: Files) -> dict[str, Any]:
        training_file = files.pairs if work.kind.is_preference else files.chats
        body = {"model": BASE, "training_file": training_file, "precision": "float32"}
        self.seen.submitted[key] = work.name
        return {"key": key, "body": {**body, **job_kinds.fields(work, files)}}

    def _send(self, asking: subprocess.Popen[str], orders: list[dict[str, Any]], *, every: float | None = None) -> None:
        assert asking.stdin is not None
        asking.stdin.write(json.dumps({"jobs": orders, "every": every or self.plan.every}) + "\n")
        asking.stdin.flush()
