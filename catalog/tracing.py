"""OpenTelemetry traces, from the request that submits a job to the published adapter.

Tracing is off unless the standard OTEL_ variables set a collector; while it is off, the SDK is not imported. The W3C
traceparent is stored in the job's row and sent to the trainer with the job. Attributes contain only ids, numbers and
Lorry's own terms, never text from users.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

log = logging.getLogger("lorry.tracing")
Service = Literal["api", "worker", "trainer"]
Value = str | int | float | bool
About = Mapping[str, Value | None]
"""Attributes by name. None values are omitted."""
NOTHING: About = {}
PARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
REMEDY = "Run `pip install 'lorry-server[telemetry]'`, or set OTEL_SDK_DISABLED=true."
FLUSH_MILLISECONDS = 3000
STANDARD = {
    "http_request_method": "http.request.method",
    "http_route": "http.route",
    "http_response_status_code": "http.response.status_code",
}
_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


@dataclass(kw_only=True, slots=True)
class _Tracing:
    """Tracing state of this process."""

    service: Service
    processor: SpanProcessor
    tracers: dict[Service, Tracer] = field(default_factory=dict[Service, "Tracer"])


_active: _Tracing | None = None


class Span:
    """A started span. While tracing is off, it only passes its parent on."""

    def __init__(self, traceparent: str | None, span: OtelSpan | None = None) -> None:
        self.traceparent = traceparent
        """Parent of this span's children."""
        self._span = span

    def note(self, about: About) -> None:
        if self._span is not None:
            self._span.set_attributes(_named(about))

    def rename(self, name: str) -> None:
        if self._span is not None:
            self._span.update_name(name)

    def fail(self, why: str) -> None:
        """Mark the span as failed. why: one of Lorry's own terms, such as an EndReason; never text from users."""
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, why))

    def end(self, *, at: float | None = None) -> None:
        """End the span. at: seconds since 1970; now by default. A second call does nothing."""
        span, self._span = self._span, None
        if span is not None:
            span.end(None if at is None else _nanoseconds(at))


def start(service: Service, *, exporter: SpanExporter | None = None) -> None:
    """Start tracing if the environment enables it or an exporter is given. Spans go to a given exporter immediately."""
    global _active  # noqa: PLW0603  (one per process, as in OpenTelemetry itself)
    processor = _processor(exporter) if exporter is not None or _is_wanted(os.environ) else None
    _active = None if processor is None else _Tracing(service=service, processor=processor)


def stop() -> None:
    """Stop tracing, and send the remaining spans for at most FLUSH_MILLISECONDS."""
    global _active
    tracing, _active = _active, None
    if tracing is not None:
        tracing.processor.force_flush(FLUSH_MILLISECONDS)
        tracing.processor.shutdown()


def begin(
    name: str,
    *,
    parent: str | None,
    at: float | None = None,
    service: Service | None = None,
    is_server: bool = False,
    about: About = NOTHING,
) -> Span:
    """Start a span; the caller calls `end` on it.

    parent: None starts a new trace. at: start time in seconds since 1970; now by default. service: the service that
    the span belongs to; this process's by default.
    """
    if _active is None:
        return Span(_undecided(parent) if is_server else parent)
    from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

    span = _tracer(_active, service or _active.service).start_span(
        name,
        context=_context(parent),
        kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
        attributes=_named(about),
        start_time=None if at is None else _nanoseconds(at),
    )
    found = span.get_span_context()
    ids = format_trace_id(found.trace_id), format_span_id(found.span_id)
    return Span(f"00-{ids[0]}-{ids[1]}-{int(found.trace_flags):02x}", span)


def record(
    name: str,
    *,
    parent: str | None,
    began_at: float,
    ended_at: float,
    service: Service | None = None,
    about: About = NOTHING,
) -> None:
    """Record a span that has already ended."""
    begin(name, parent=parent, at=began_at, service=service, about=about).end(at=max(began_at, ended_at))


@contextmanager
def span(name: str, *, parent: str | None, is_server: bool = False, about: About = NOTHING) -> Generator[Span]:
    """Open a span around the block, in which it is `current`. An exception marks it as failed.

    Only the name of the exception's class is recorded.
    """
    begun = begin(name, parent=parent, is_server=is_server, about=about)
    token = _current.set(begun.traceparent)
    try:
        yield begun
    except BaseException as error:
        begun.fail(type(error).__name__)
        raise
    finally:
        _current.reset(token)
        begun.end()


def current() -> str | None:
    """Return the traceparent of the current context; None if there is none."""
    return _current.get()


def well_formed(traceparent: str | None) -> str | None:
    """Return a traceparent from outside if it is a valid one of version 00; None otherwise."""
    return traceparent if traceparent is not None and PARENT.fullmatch(traceparent) else None


def of_job(job_id: str, trace: str | None) -> str:
    """Return the parent of a job's spans.

    For a job without one, such as a trial of a sweep, it is derived from the job's id, so that the spans of all
    processes are in one trace.
    """
    if trace is not None:
        return trace
    digest = hashlib.sha256(job_id.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace id for log lines: 32 hexadecimal digits."""
    found = PARENT.fullmatch(traceparent or "")
    return found[1] if found else None


def _is_wanted(environ: Mapping[str, str]) -> bool:
    """Apply OpenTelemetry's specification of environment variables, except that tracing is off without a collector."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if named not in ("", "otlp", "none"):
        log.warning("OTEL_TRACES_EXPORTER=%s is not supported: tracing is disabled. Set it to otlp or none.", named)
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return named == "otlp" or (named == "" and any(environ.get(name) for name in endpoints))


def _processor(exporter: SpanExporter | None) -> SpanProcessor | None:
    """Return the span processor; log a warning and return None if OpenTelemetry is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    except ImportError:
        log.warning("Tracing is disabled: OpenTelemetry is not installed. %s", REMEDY)
        return None
    if exporter is not None:
        return SimpleSpanProcessor(exporter)
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    if any(os.environ.get(name) == "grpc" for name in protocols):
        log.warning("Traces are sent by http/protobuf, not by grpc: set the collector's port for http/protobuf, 4318.")
    return BatchSpanProcessor(OTLPSpanExporter())


def _tracer(tracing: _Tracing, service: Service) -> Tracer:
    tracer = tracing.tracers.get(service)
    if tracer is None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_NAMESPACE, Resource
        from opentelemetry.sdk.trace import TracerProvider

        name = os.environ.get("OTEL_SERVICE_NAME", "lorry")
        resource = Resource.create({SERVICE_NAME: f"{name}-{service}", SERVICE_NAMESPACE: name})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.sampler = own_decision(provider.sampler)
        provider.add_span_processor(tracing.processor)
        tracer = tracing.tracers[service] = provider.get_tracer("lorry")
    return tracer


def own_decision(sampler: Sampler) -> Sampler:
    """Wrap the sampler so that it treats each request to the server as the start of a new trace.

    Otherwise any client could force or prevent sampling with the flag or the id of its traceparent.
    """
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
    from opentelemetry.trace import SpanKind

    draws = RandomIdGenerator()

    class OwnDecision(Sampler):
        def should_sample(
            self,
            parent_context: Context | None,
            trace_id: int,
            name: str,
            kind: SpanKind | None = None,
            *further: Any,
            **given: Any,
        ) -> SamplingResult:
            if kind is SpanKind.SERVER:
                parent_context, trace_id = None, draws.generate_trace_id()
            return sampler.should_sample(parent_context, trace_id, name, kind, *further, **given)

        def get_description(self) -> str:
            return sampler.get_description()

    return OwnDecision()


def _undecided(parent: str | None) -> str | None:
    """Return a client's traceparent with the sampled flag set, for use while this process records no spans."""
    return None if parent is None else f"{parent[:-2]}01"


def _context(parent: str | None):
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    found = PARENT.fullmatch(parent or "")
    if found is None:
        return Context()
    trace, span, flags = (int(part, 16) for part in found.groups())
    parent_span = SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(flags))
    return set_span_in_context(NonRecordingSpan(parent_span), Context())


def _named(about: About) -> dict[str, Value]:
    """Prefix attribute names with "lorry.", except those that OpenTelemetry's conventions define."""
    return {STANDARD.get(name, f"lorry.{name}"): value for name, value in about.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
