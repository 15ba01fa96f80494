"""The API server's log line for each request names the request, the job and the trace."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from tests.catalog.world import World
from tests.json_log import json_log, lines_of

CLIENTS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    with json_log("lorry.api", monkeypatch) as out:
        yield out


def test_request_log_line_names_request_job_and_trace(client: TestClient, world: World, out: io.StringIO) -> None:
    job = world.submit()

    answer = client.get(f"/v1/fine_tuning/jobs/{job.id}", headers={"traceparent": CLIENTS})
    client.get("/v1/files")

    first, second = [line for line in lines_of(out) if line["message"].startswith("request ")]
    assert (first["job"], first["trace"]) == (job.id, CLIENTS[3:35])
    assert first["request"] == answer.headers["x-request-id"]
    assert not {"job", "trace"} & set(second)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_of_health_checks_only_failed_ones_are_logged_at_the_level_info(
    client: TestClient, out: io.StringIO, path: str
) -> None:
    client.get(path)
    client.get("/v1/files")
    client.get(path, headers={"host": "another.example.com"})

    logged = [line["message"].split()[3:5] for line in lines_of(out)]
    assert [path for path, _ in logged] == ["path=/v1/files", f"path={path}"]
    assert logged[1][1] == "status=421"
