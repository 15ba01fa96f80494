"""A soak from beginning to end: a calm stretch, a storm of faults, and the time until all jobs have finished."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import func, select

from catalog.errors import LorryError
from catalog.states import FINAL_STATES
from catalog.tables.jobs import Job
from qa.chaos.audit import tables
from qa.chaos.audit.findings import Finding
from qa.chaos.faults.processes import add_endpoint, all_delivered
from qa.chaos.service import FaultSite
from qa.chaos.soak import assessment
from qa.chaos.soak.assessment import Compared, Ended, Isolated, Span
from qa.chaos.soak.isolation import Neighborhood
from qa.chaos.soak.job_kinds import Body, upload, with_ids
from qa.chaos.soak.storm import Storm, draw
from qa.chaos.soak.tenants import Client, Sample, read_samples
from tests.api.hook_receiver import receiving
from tests.worker_site import ROOT

TICK_SECONDS = 0.1
TELL_SECONDS = 30.0
WARM_SECONDS = 45.0
"""The first part of the calm stretch, which is not measured, because workers start and load."""
OPERATOR_SECONDS = 10.0
"""Time limit of the operator's requests, during which no fault begins or ends."""
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
    jobs: int
    workers: int

    @property
    def every(self) -> float:
        """Seconds between two submissions."""
        return self.minutes * 60 * SUBMITTED_BY / self.jobs


class Soak:
    """One soak, and its observations after `run`."""

    def __init__(self, site: FaultSite, plan: Plan, digests: Mapping[str, str], works: Mapping[str, Body]) -> None:
        """digests: of the weights of each work without any fault."""
        self.site, self.plan, self.digests, self.works = site, plan, digests, works
        self.path, self.operators_path = site.folder / "samples.jsonl", site.folder / "operator.jsonl"
        operator = Client(site.url, site.key, self.operators_path, timeout_seconds=OPERATOR_SECONDS)
        self.storm = Storm(site, plan.workers, operator)
        self.submitted: dict[str, str] = {}
        """By key, the name of the work."""
        self.samples: list[Sample] = []
        self.of_operator: list[Sample] = []
        self.calm: Span = (0.0, 0.0)
        self.stormy: Span = (0.0, 0.0)
        self.isolated: Isolated | None = None
        self.num_calm_jobs = max(1, int(plan.calm_minutes * 60 / plan.every))
        self.seconds_after = 0.0
        """Time from the last fault until every job had finished."""
        self.not_passed: list[str] = []
        """Failpoints that no process passed."""
        self.jobs: dict[str, Ended] = {}
        self.problems: list[str] = []
        self.findings: Sequence[Finding] = ()
        self._told_at = time.monotonic()

    def run(self) -> None:
        with receiving() as receiver:
            receiver.answer = self.site.heard
            add_endpoint(self.site, receiver.url)
            self._while(lambda: self.storm.is_away("api"))
            self._files = upload(self.site)
            with self._tenant():
                self._calm()
                if self.plan.isolation_minutes:
                    self._isolate()
                self._storm()
                self._rest()
            self._judge()

    def compare(self) -> list[Compared]:
        return assessment.compare(self.samples, self.storm.windows, usual=self.calm, disturbed=self.stormy)

    def compare_isolated(self, isolated: Isolated) -> list[Compared]:
        """Compare the requests of the ordinary project, alone and next to the noisy neighbor."""
        spans = {"usual": isolated.alone.span, "disturbed": isolated.disturbed.span}
        return assessment.compare(self.samples, self.storm.windows, **spans)

    # The stretches

    def _calm(self) -> None:
        seconds = self.plan.calm_minutes * 60
        self._submit("calm", self.num_calm_jobs)
        began = time.time()
        self._while(lambda: time.time() < began + seconds)
        self.calm = (began + min(WARM_SECONDS, seconds / 3), time.time())

    def _isolate(self) -> None:
        """Run both stretches, alone and next to a noisy neighbor, each with more jobs than the workers finish."""
        near, seconds = Neighborhood(self.site, self._while), self.plan.isolation_minutes * 60
        every = self.plan.every / OVERLOAD
        stretch = {"seconds": seconds, "warm_seconds": min(WARM_SECONDS, seconds / 3)}
        with near.separate_machines(self.storm.workers):
            self._submit("alone", int(seconds / every), every=every)
            near.measure(near.found.alone, **stretch)
            self._submit("disturbed", int(seconds / every), every=every)
            with near.neighbor():
                near.measure(near.found.disturbed, **stretch)
        self.isolated = near.found

    def _storm(self) -> None:
        self._submit("storm", self.plan.jobs)
        began, began_at = time.monotonic(), time.time()
        seconds = self.plan.minutes * 60
        for fault in draw(self.plan.seed, seconds=seconds):
            self._while(lambda due=began + fault.at: time.monotonic() < due)
            self.storm.inject(fault)
        self._while(lambda: time.monotonic() < began + seconds)
        self.stormy = (began_at, time.time())

    def _rest(self) -> None:
        """Wait until everything is finished, without further faults."""
        began, patience = time.monotonic(), self.plan.patience_minutes * 60
        while not self.storm.is_over:
            self.not_passed += self.storm.end()
            self._tick()
        self._while(lambda: time.monotonic() < began + patience and not self._is_done())
        self.seconds_after = time.monotonic() - began

    def _is_done(self) -> bool:
        time.sleep(1.0)
        keys = {sample.key for sample in read_samples(self.path) if sample.job_id is not None}
        states = self._states()
        is_ended = keys == set(self.submitted) and set(states) <= FINAL_STATES and bool(states)
        return is_ended and all_delivered(self.site)

    def _judge(self) -> None:
        self.samples = read_samples(self.path)
        # a request without a response is repeated
        self.of_operator = [sample for sample in read_samples(self.operators_path) if sample.status]
        for sample in self.samples:
            if sample.key is not None and sample.job_id is not None:
                self.site.submissions[sample.key].append(sample.job_id)
        found = tables.read(self.site.settings.resolved_database_url())
        self.jobs = assessment.ended(found, project_id=self.site.caller.project_id)
        args = (self.submitted, self.samples, self.jobs, self.digests, self.storm.windows)
        self.problems = [*assessment.problems(*args, of_operator=self.of_operator), *self.storm.failures]
        self.problems += assessment.slow(self.compare())
        if self.isolated is not None:
            self.problems += assessment.effects(self.isolated, self.compare_isolated(self.isolated))
        num_faults, num_hooks = self.storm.injected.total(), len(self.site.hooks)
        if not num_faults or not num_hooks:
            self.problems.append(f"{num_faults} faults were injected, and {num_hooks} webhooks came")
        self.site.stop()
        self.findings = self.site.audit()

    # Continuous actions

    def _while(self, condition: Callable[[], object]) -> None:
        while condition():
            self._tick()
            time.sleep(TICK_SECONDS)

    def _tick(self) -> None:
        self.storm.tick()
        if time.monotonic() - self._told_at > TELL_SECONDS:
            self._told_at = time.monotonic()
            states = ", ".join(f"{number} {state}" for state, number in sorted(self._states().items()))
            print(f"{time.strftime('%H:%M:%S')} {self.storm.injected.total()} faults; {states}", flush=True)

    def _states(self) -> dict[str, int]:
        try:
            with self.site.db.read() as session:
                return dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).tuples().all())
        except LorryError:
            return {}

    # The ordinary tenant

    @contextmanager
    def _tenant(self) -> Iterator[None]:
        argv = [sys.executable, "-m", "qa.chaos.soak.tenants", "ordinary", self.site.url, self.site.key, str(self.path)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, text=True, cwd=ROOT) as self._asking:
            yield
            self._asking.communicate(timeout=120)
        assert self._asking.returncode == 0, self.site.log()

    def _submit(self, stretch: str, number: int, *, every: float | None = None) -> None:
        """Let the tenant submit jobs at a constant rate, which is that of the storm by default."""
        names = list(self.works)
        keys = {f"{stretch}-{count}-{names[count % len(names)]}": names[count % len(names)] for count in range(number)}
        self.submitted |= keys
        jobs = [{"key": key, "body": with_ids(self.works[name], self._files)} for key, name in keys.items()]
        assert self._asking.stdin is not None
        self._asking.stdin.write(json.dumps({"jobs": jobs, "every": every or self.plan.every}) + "\n")
        self._asking.stdin.flush()
