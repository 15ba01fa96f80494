"""OpenTelemetry traces, from the request that submits a job to the published adapter.

Tracing is off unless the standard OTEL_ variables set a collector. While it is off, a span only passes its parent on,
and the SDK is not imported (see span_export.py). The W3C traceparent is stored in the job's row and sent to the trainer
with the job. Attributes contain only ids, numbers and Lorry's own terms, never text from users.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracer, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from catalog.span_export import SpanExport

log = logging.getLogger("lorry.tracing")
Service = Literal["api", "worker", "trainer"]
Value = str | int | float | bool
About = Mapping[str, Value | None]
"""Attributes by name, without the prefix "lorry.". None values are omitted."""
NOTHING: About = {}
PARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
W3C = TraceContextTextMapPropagator()
REMEDY = "Run `pip install 'lorry-server[telemetry]'`, or set OTEL_SDK_DISABLED=true."
_export: SpanExport | None = None


def start(service: Service, *, exporter: SpanExporter | None = None) -> None:
    """Start tracing if the environment enables it or an exporter is given. Spans go to a given exporter immediately."""
    global _export  # noqa: PLW0603  (one per process, as in OpenTelemetry itself)
    _export = None
    if exporter is None and not _is_wanted(os.environ):
        return
    try:
        from catalog.span_export import SpanExport
    except ImportError:
        log.warning("Tracing is disabled: OpenTelemetry is not installed. %s", REMEDY)
    else:
        _export = SpanExport(service, exporter)


def stop() -> None:
    """Stop tracing, and send the remaining spans within a time limit."""
    global _export
    export, _export = _export, None
    if export is not None:
        export.close()


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
    if _export is None and is_server and parent is not None:
        parent = f"{parent[:-2]}01"  # the client's flag does not decide whether the workers record the job
    return (_export.tracer(service) if _export is not None else NoOpTracer()).start_span(
        name,
        context=W3C.extract({"traceparent": parent or ""}, Context()),
        kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
        attributes=attributes(about),
        start_time=None if at is None else _nanoseconds(at),
    )


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
    begun = begin(name, parent=parent, at=began_at, service=service, about=about)
    begun.end(_nanoseconds(max(began_at, ended_at)))


@contextmanager
def span(name: str, *, parent: str | None, is_server: bool = False, about: About = NOTHING) -> Generator[Span]:
    """Open a span around the block, in which it is `current`. An exception marks it as failed.

    Only the name of the exception's class is recorded.
    """
    begun = begin(name, parent=parent, is_server=is_server, about=about)
    with trace.use_span(begun, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield begun
        except BaseException as error:
            fail(begun, type(error).__name__)
            raise


def attributes(about: About) -> dict[str, Value]:
    """Return attributes for a span, with the prefix of names that are Lorry's own."""
    return {f"lorry.{name}": value for name, value in about.items() if value is not None}


def fail(span: Span, reason: str) -> None:
    """Mark the span as failed. reason: one of Lorry's own terms, such as an EndReason; never text from users."""
    span.set_status(Status(StatusCode.ERROR, reason))


def traceparent(span: Span) -> str | None:
    """Return the parent of this span's children. None: tracing is off and the span has no parent."""
    carrier: dict[str, str] = {}
    W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent")


def current() -> str | None:
    """Return the traceparent of the current context; None if there is none."""
    return traceparent(trace.get_current_span())


def well_formed(parent: str | None) -> str | None:
    """Return a traceparent from outside if it is a valid one of version 00; None otherwise."""
    return parent if parent is not None and PARENT.fullmatch(parent) else None


def of_job(job_id: str, parent: str | None) -> str:
    """Return the parent of a job's spans.

    For a job without one, such as a trial of a sweep, it is derived from the job's id, so that the spans of all
    processes are in one trace.
    """
    if parent is not None:
        return parent
    digest = hashlib.sha256(job_id.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"


def trace_id(parent: str | None) -> str | None:
    """Return the trace id for log lines: 32 hexadecimal digits."""
    found = PARENT.fullmatch(parent or "")
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


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
