"""The API server's log line for each request names the request, the job and the trace."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from catalog import logs
from tests.catalog.world import World

CLIENTS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.setenv("LORRY_LOG_FORMAT", "json")
    out, logger = io.StringIO(), logging.getLogger("lorry.api")
    handler, level = logging.StreamHandler(out), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logs.redact_handlers(logger)
    yield out
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_request_log_line_names_request_job_and_trace(client: TestClient, world: World, out: io.StringIO) -> None:
    job = world.submit()

    answer = client.get(f"/v1/fine_tuning/jobs/{job.id}", headers={"traceparent": CLIENTS})
    client.get("/v1/files")

    first, second = [line for line in _lines(out) if line["message"].startswith("request ")]
    assert (first["job"], first["trace"]) == (job.id, CLIENTS[3:35])
    assert first["request"] == answer.headers["x-request-id"]
    assert not {"job", "trace"} & set(second)


def _lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]
