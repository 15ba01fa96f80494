"""Prometheus metrics, named by its conventions: counters of this process and gauges of the whole fleet.

Label values are bounded: the template of a route, never a path that a client sent; never a job, project or user.
docs/reference/metrics.md describes each metric, and a test compares the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from catalog.errors import RejectionReason
from catalog.fleet.metrics import Numbers

METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
OF_DEVICES = {
    "utilization_ratio": "Fraction of time in which the device was busy, 0 to 1.",
    "memory_bytes": "Total memory of the device.",
    "memory_used_bytes": "Memory of the device in use by any process.",
    "temperature_celsius": "Temperature of the GPU.",
    "power_watts": "Power draw of the GPU.",
}


class Telemetry:
    """Metrics with one registry per app, so that two apps in one process don't share counters."""

    def __init__(self, tasks: Iterable[str] = (), loops: Iterable[str] = ()) -> None:
        """Both arguments are names: first of the periodic runs, each of which counts as successful when the process
        starts; then of the background tasks, which run as long as the process."""
        self.registry = CollectorRegistry()
        self._tasks = tuple(tasks)
        self._loops = tuple(loops)
        self._requests = Counter(
            "lorry_http_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "lorry_http_request_duration_seconds",
            "Time until the last byte of the response.",
            ["method", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._rejected_keys = Counter(
            "lorry_http_rejected_keys",
            "Requests whose API key or browser session was rejected.",
            ["reason"],
            registry=self.registry,
        )
        self._streams = Gauge("lorry_http_streams", "Open live streams.", registry=self.registry)
        self._runs = Counter(
            "lorry_background_runs", "Runs of background tasks.", ["task", "outcome"], registry=self.registry
        )
        self._done_at = Gauge(
            "lorry_background_last_success_timestamp_seconds",
            "Unix time of the task's last success in this process; initially the start of the process.",
            ["task"],
            registry=self.registry,
        )
        self._tries = Counter(
            "lorry_webhook_tries", "Requests sent to webhook endpoints.", ["outcome"], registry=self.registry
        )
        self._restarts = Counter(
            "lorry_background_restarts",
            "Restarts of background tasks after a crash.",
            ["task"],
            registry=self.registry,
        )
        self._begin()

    def _begin(self) -> None:
        """Create all label combinations, so that each series exists before its first event."""
        for loop in self._loops:
            self._restarts.labels(task=loop)
        for outcome in ("delivered", "failed"):
            self._tries.labels(outcome=outcome)
        for reason in get_args(RejectionReason):
            self._rejected_keys.labels(reason=reason)
        for task in self._tasks:
            self._done_at.labels(task=task).set(time.time())
            for outcome in ("done", "failed"):
                self._runs.labels(task=task, outcome=outcome)

    def observe(self, scope: Scope, *, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_template(scope)
        self._requests.labels(method=method, route=route, status=str(status)).inc()
        if not route.endswith("/stream"):
            self._seconds.labels(method=method, route=route).observe(seconds)

    def count_rejected_key(self, reason: RejectionReason) -> None:
        self._rejected_keys.labels(reason=reason).inc()

    def count_streams(self, read: Callable[[], float]) -> None:
        self._streams.set_function(read)

    def count_long_writes(self, read: Callable[[], int]) -> None:
        self.registry.register(_LongWrites(read))

    def count_run(self, task: str, *, is_done: bool) -> None:
        """Count a periodic run. The constructor must have received its name, so its series exist from the start."""
        assert task in self._tasks, f"unknown periodic run: {task}"
        self._runs.labels(task=task, outcome="done" if is_done else "failed").inc()
        if is_done:
            self._done_at.labels(task=task).set(time.time())

    def count_restart(self, task: str) -> None:
        """Count a restart of a background task. The constructor must have received its name."""
        assert task in self._loops, f"unknown background task: {task}"
        self._restarts.labels(task=task).inc()

    def count_try(self, *, is_delivered: bool) -> None:
        """Count a request to a webhook endpoint."""
        self._tries.labels(outcome="delivered" if is_delivered else "failed").inc()

    def expose(self, numbers: Numbers) -> bytes:
        """Return all metrics in the text format, with the current numbers of the fleet."""
        fleet = CollectorRegistry()
        fleet.register(_Fleet(numbers))
        return generate_latest(self.registry) + generate_latest(fleet)


class _LongWrites(Collector):
    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        description = "Write transactions whose work took more than a second."
        yield _counter("lorry_database_long_writes", description, (), {(): self._read()})


class _Fleet(Collector):
    """Metrics of the fleet. Every family is present, even without values."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterable[Metric]:
        yield from self._of_jobs()
        yield from self._of_claims()
        yield from self._of_workers()
        yield from self._of_devices()
        yield from self._of_webhooks()

    def _of_jobs(self) -> Iterable[Metric]:
        found = self._numbers
        by_class = {(state.value, each.name): number for (state, each), number in found.jobs.items()}
        yield _gauge("lorry_jobs", "Jobs by state and priority.", ("state", "priority"), by_class)
        waits = {(each.name,): seconds for each, seconds in found.oldest_wait_seconds.items()}
        yield _gauge("lorry_queue_oldest_wait_seconds", "Wait time of the oldest queued job.", ("priority",), waits)
        yield _counter("lorry_job_events", "Recorded job events.", (), {(): found.events})
        tokens = {(): found.trained_tokens}
        yield _counter("lorry_trained_tokens", "Trained tokens of jobs that succeeded.", (), tokens)
        yield _gauge("lorry_adapters", "Stored adapters.", (), {(): found.adapters})

    def _of_claims(self) -> Iterable[Metric]:
        found = self._numbers
        yield _counter("lorry_claims", "Claims of jobs for training.", (), {(): found.claims})
        ended = {(reason.value,): number for reason, number in found.attempts_ended.items()}
        yield _counter("lorry_attempts_ended", "Finished attempts, by reason.", ("reason",), ended)
        leases = {(work,): number for work, number in found.leases.items()}
        yield _gauge("lorry_leases", "Jobs that workers hold.", ("work",), leases)
        yield _gauge("lorry_leases_overdue", "Expired leases not reclaimed yet.", (), {(): found.leases_overdue})
        expired = {(work,): number for work, number in found.leases_expired.items()}
        yield _counter("lorry_leases_expired", "Leases that expired without renewal.", ("work",), expired)

    def _of_workers(self) -> Iterable[Metric]:
        found = self._numbers
        workers = {(state,): number for state, number in found.workers.items()}
        yield _gauge("lorry_workers", "Workers seen in the last hour, by state.", ("state",), workers)
        cordoned = {(): found.workers_cordoned}
        yield _gauge("lorry_workers_cordoned", "Cordoned workers, which claim no new jobs.", (), cordoned)
        trainers = {(base,): number for base, number in found.trainers.items()}
        yield _gauge("lorry_trainers", "Trainers, by loaded base model.", ("base_model",), trainers)
        jobs = {(base,): number for base, number in found.trainer_jobs.items()}
        yield _gauge("lorry_trainer_jobs", "Jobs in training, by base model.", ("base_model",), jobs)

    def _of_devices(self) -> Iterable[Metric]:
        found = self._numbers
        of_trainers = (
            ("tokens_per_second", "Throughput of the trainer in tokens per second.", found.tokens_per_second),
            ("memory_predicted_bytes", "Predicted memory of the trainer.", found.predicted_bytes),
            ("memory_peak_bytes", "Peak memory of the trainer.", found.peak_bytes),
        )
        for name, text, values in of_trainers:
            yield _gauge(f"lorry_trainer_{name}", text, ("host", "device"), values)
        for name, text in OF_DEVICES.items():
            values = {device: report[name] for device, report in found.devices.items() if name in report}
            yield _gauge(f"lorry_device_{name}", text, ("host", "device"), values)

    def _of_webhooks(self) -> Iterable[Metric]:
        found = self._numbers
        pending = {(): found.webhooks_pending}
        yield _gauge(
            "lorry_webhook_deliveries_pending", "Pending webhook deliveries, counted up to 10,000.", (), pending
        )
        overdue = {(): found.webhooks_overdue_seconds}
        yield _gauge(
            "lorry_webhook_overdue_seconds", "Time by which the oldest webhook delivery is overdue.", (), overdue
        )


_Values = Mapping[tuple[str, ...], float] | Mapping[tuple[()], float]


def _gauge(name: str, text: str, labels: tuple[str, ...], values: _Values) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: _Values) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def route_template(scope: Scope) -> str:
    """Return the route's template, such as /v1/files/{file_id}."""
    route = scope.get("route")
    template = getattr(route, "path", None)
    if isinstance(template, str):
        return template
    return "/dashboard" if scope["path"].startswith("/dashboard") and scope.get("endpoint") else "unmatched"
