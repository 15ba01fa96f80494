"""Numbers for Prometheus. Labels are bounded: a route's template, never a path somebody sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from catalog.fleet import Counts

METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    """One registry per app, so that two apps in one process don't share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "lorry_http_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "lorry_http_request_seconds",
            "Seconds until the last byte of an answer.",
            ["method", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._streams = Gauge("lorry_http_streams", "Live streams that are open.", registry=self.registry)

    def observe(self, scope: Scope, *, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_template(scope)
        self._requests.labels(method=method, route=route, status=str(status)).inc()
        if not route.endswith("/stream"):
            self._seconds.labels(method=method, route=route).observe(seconds)

    def count_streams(self, read: Callable[[], float]) -> None:
        self._streams.set_function(read)

    def expose(self, counts: Counts) -> bytes:
        """The text format, with the fleet's numbers as they are now."""
        fleet = CollectorRegistry()
        fleet.register(_Fleet(counts))
        return generate_latest(self.registry) + generate_latest(fleet)


class _Fleet(Collector):
    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        yield _family("lorry_jobs", "Jobs by state.", "state", self._counts.jobs)
        yield _family("lorry_workers", "Workers by state.", "state", self._counts.workers)
        yield GaugeMetricFamily("lorry_workers_cordoned", "Cordoned workers.", value=self._counts.num_cordoned)
        yield CounterMetricFamily("lorry_job_events", "Events of jobs recorded.", value=self._counts.num_events)
        yield GaugeMetricFamily("lorry_adapters", "Adapters that are kept.", value=self._counts.adapters)


def _family(name: str, text: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def route_template(scope: Scope) -> str:
    """The route's template, such as /v1/files/{file_id}."""
    route = scope.get("route")
    template = getattr(route, "path", None)
    if isinstance(template, str):
        return template
    return "/dashboard" if scope["path"].startswith("/dashboard") and scope.get("endpoint") else "unmatched"
