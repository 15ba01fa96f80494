"""Exports spans to a collector. It imports OpenTelemetry's SDK, so `tracing` imports it only if tracing is enabled."""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_NAMESPACE, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from opentelemetry.trace import SpanKind, Tracer

from catalog.tracing import Service

log = logging.getLogger("lorry.tracing")
FLUSH_MILLISECONDS = 3000


class SpanExport:
    """The tracers of this process, and the queue of spans that are not sent yet."""

    def __init__(self, service: Service, exporter: SpanExporter | None) -> None:
        protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        if any(os.environ.get(name) == "grpc" for name in protocols):
            log.warning("Traces are sent by http/protobuf, not by grpc: set the collector's port for it, 4318.")
        self._service: Service = service
        self._processor = SimpleSpanProcessor(exporter) if exporter else BatchSpanProcessor(OTLPSpanExporter())
        self._tracers: dict[Service, Tracer] = {}

    def tracer(self, service: Service | None) -> Tracer:
        """Return the tracer of a service, by default that of this process: a worker records the trainer's spans."""
        service = service or self._service
        if service not in self._tracers:
            name = os.environ.get("OTEL_SERVICE_NAME", "lorry")
            resource = Resource.create({SERVICE_NAME: f"{name}-{service}", SERVICE_NAMESPACE: name})
            provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            provider.sampler = _OwnDecision(provider.sampler)
            provider.add_span_processor(self._processor)
            self._tracers[service] = provider.get_tracer("lorry")
        return self._tracers[service]

    def close(self) -> None:
        self._processor.force_flush(FLUSH_MILLISECONDS)
        self._processor.shutdown()


class _OwnDecision(Sampler):
    """Treats each request to the server as the start of a new trace.

    Otherwise any client could force or prevent sampling with the flag or the id of its traceparent.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

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
            parent_context, trace_id = None, 1 + secrets.randbelow(2**128 - 1)
        return self._sampler.should_sample(parent_context, trace_id, name, kind, *further, **given)

    def get_description(self) -> str:
        return self._sampler.get_description()
