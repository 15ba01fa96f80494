"""Tracing is off unless the standard variables name a collector."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from catalog import tracing

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
COLLECTOR = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", COLLECTOR, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield
    tracing.stop()


@pytest.mark.parametrize(
    ("variables", "is_on"),
    [
        ({}, False),
        ({COLLECTOR: "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", COLLECTOR: "http://127.0.0.1:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", COLLECTOR: "http://127.0.0.1:4318"}, False),
    ],
)
def test_standard_variables_switch_tracing_on(variables: dict[str, str], is_on: bool) -> None:
    assert tracing._is_wanted(variables) is is_on  # pyright: ignore[reportPrivateUsage]


def test_unknown_exporter_is_reported_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")

    tracing.start("api")

    assert "zipkin is not supported" in caplog.text
    assert tracing.traceparent(tracing.begin("a", parent=PARENT)) == PARENT


def test_missing_package_is_reported_and_the_service_continues(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(COLLECTOR, "http://127.0.0.1:4318")
    monkeypatch.delitem(sys.modules, "catalog.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    tracing.start("api")

    assert "lorry-server[telemetry]" in caplog.text
    with tracing.span("a", parent=PARENT):
        assert tracing.current() == PARENT


def test_disabled_tracing_imports_no_sdk_or_exporter() -> None:
    """FastAPI itself imports the OpenTelemetry API if it is installed."""
    code = "import sys, catalog.fleet.workers, worker.supervisor; from catalog import tracing; tracing.start('api')\n"
    code += "with tracing.span('a', parent=None): pass\n"
    code += "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_spans_reach_the_configured_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *_: object) -> None:  # noqa: A002  (the library's name)
            """Keep the test output quiet."""

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(COLLECTOR, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        tracing.start("worker")
        tracing.record("queue", parent=PARENT, began_at=1.0, ended_at=2.0, about={"job": "ftjob-1"})
        tracing.stop()
    finally:
        server.shutdown()
        server.server_close()

    assert [path for path, _ in got] == ["/v1/traces"]
    for expected in (b"lorry-worker", b"queue", b"lorry.job", b"ftjob-1", bytes.fromhex(PARENT[3:35])):
        assert expected in got[0][1]


def test_unreachable_collector_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(COLLECTOR, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing.start("api")

    with caplog.at_level(logging.CRITICAL):
        tracing.record("queue", parent=PARENT, began_at=1.0, ended_at=2.0)
        tracing.stop()


@pytest.mark.parametrize("flag", ["00", "01"])
@pytest.mark.parametrize(
    ("sampler", "is_recorded"),
    [("always_on", True), ("always_off", False), ("parentbased_always_on", True), ("parentbased_always_off", False)],
)
def test_client_does_not_decide_sampling(
    monkeypatch: pytest.MonkeyPatch, sampler: str, flag: str, is_recorded: bool
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    exporter = InMemorySpanExporter()
    tracing.start("api", exporter=exporter)
    sent = f"{PARENT[:-2]}{flag}"

    request = tracing.begin("GET", parent=sent, is_server=True)
    decided = tracing.traceparent(request) or ""
    tracing.begin("inside", parent=decided).end()
    request.end()

    assert tracing.trace_id(decided) == tracing.trace_id(sent)
    assert decided[-2:] == ("01" if is_recorded else "00")
    assert len(exporter.get_finished_spans()) == (2 if is_recorded else 0)


def test_client_cannot_choose_a_sampled_trace_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.000001")
    exporter = InMemorySpanExporter()
    tracing.start("api", exporter=exporter)

    for _ in range(10):
        tracing.begin("GET", parent=f"00-{'0' * 31}1-{'1' * 16}-01", is_server=True).end()

    assert exporter.get_finished_spans() == ()


def test_client_flag_is_not_forwarded_while_tracing_is_off() -> None:
    sent = f"{PARENT[:-2]}00"

    assert tracing.traceparent(tracing.begin("GET", parent=sent, is_server=True)) == f"{PARENT[:-2]}01"


@pytest.mark.parametrize(
    "odd", [None, "", "x", PARENT + "-1", PARENT.upper(), "00-" + "0" * 32 + "-00f067aa0ba902b7-01"]
)
def test_malformed_traceparent_is_ignored(odd: str | None) -> None:
    assert tracing.well_formed(odd) is None
    assert tracing.trace_id(odd) is None


def test_job_without_a_trace_has_a_stable_one() -> None:
    made = tracing.of_job("ftjob-1", None)

    assert tracing.well_formed(made) == made == tracing.of_job("ftjob-1", None)
    assert tracing.of_job("ftjob-2", None) != made
    assert tracing.of_job("ftjob-1", PARENT) == PARENT
