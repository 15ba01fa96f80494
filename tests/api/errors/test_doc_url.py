"""Every error links to its entry in the error reference, which the service itself serves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from catalog.tables.jobs import Job
from tests.api.site import error_of
from tests.catalog.world import World


def test_the_link_leads_to_the_entry_of_the_code(client: TestClient, anonymous: TestClient) -> None:
    error = error_of(client.get("/v1/fine_tuning/jobs/ftjob-0"))

    url, _, anchor = error["doc_url"].partition("#")
    page = anonymous.get(url)
    assert (url, anchor) == ("http://127.0.0.1/dashboard/errors.html", "job_not_found")
    assert page.status_code == 200
    assert '<section id="job_not_found">' in page.text


def test_the_link_uses_the_public_url(services: Services, app: FastAPI, client: TestClient) -> None:
    settings = services.api_settings.model_copy(update={"public_url": "https://lorry.example.com/"})
    app.state.services = dataclasses.replace(services, api_settings=settings)

    error = error_of(client.get("/v1/unknown"))

    assert error["doc_url"] == "https://lorry.example.com/dashboard/errors.html#unknown_route"


def test_an_unknown_host_name_does_not_appear_in_the_link(client: TestClient) -> None:
    error = error_of(client.get("/v1/models", headers={"host": "attacker.example"}))

    assert error["doc_url"] == "/dashboard/errors.html#unknown_host"
    assert "'attacker.example'" in error["message"]


def test_the_error_of_a_failed_job_has_a_link(world: World, client: TestClient) -> None:
    job = world.submit()
    with world.db.write() as session:
        session.get_one(Job, job.id).error = {"code": "conflicting_value", "message": "Too high.", "param": None}

    error: dict[str, Any] = client.get(f"/v1/fine_tuning/jobs/{job.id}").json()["error"]

    assert error["doc_url"] == "http://127.0.0.1/dashboard/errors.html#conflicting_value"


@pytest.mark.parametrize("path", ["/v1/unknown", "/v1/fine_tuning/jobs/ftjob-0"])
def test_no_link_of_one_request_appears_in_the_next(client: TestClient, path: str) -> None:
    other = client.get(path, headers={"host": "localhost"})

    assert error_of(other)["doc_url"].startswith("http://localhost/")
    assert error_of(client.get(path))["doc_url"].startswith("http://127.0.0.1/")
