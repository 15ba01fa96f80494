"""The real openai package, with strict validation of every response, against the service in a separate process.

The tests replace the worker by calls of the catalog on the same database.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from catalog.db.database import Database
from catalog.registry import base_models
from catalog.settings import Settings
from tests.catalog.world import DESCRIPTION, claim_import_of, sha
from tests.system.api_process import Service, api_process

httpx: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
"""The HTTP library that this version of openai uses."""
CHAT = {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}]}
DATA = b"".join(json.dumps(CHAT).encode() + b"\n" for _ in range(20))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def database(data_dir: Path, module_database: None) -> Iterator[Database]:
    db = Database(Settings(data_dir=data_dir).resolved_database_url())
    db.migrate()
    yield db
    db.close()


@pytest.fixture(scope="module")
def service(data_dir: Path, database: Database) -> Iterator[Service]:
    with api_process(data_dir) as service:
        base_models.add(database, name="smol", kind="folder", source="/models/smol")
        imported = {"manifest": {"files": []}, "description": DESCRIPTION}
        base_models.finish_import(database, claim_import_of(database, "smol"), digest=sha("smol"), **imported)
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


def test_openai_client_raises_its_own_errors_with_all_fields(client: openai.OpenAI, service: Service) -> None:
    with pytest.raises(openai.BadRequestError) as bad_file:
        client.files.create(file=("x.jsonl", b"nonsense\n"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as bad_rank:
        client.fine_tuning.jobs.create(model="smol", training_file="x", extra_body={"lora": {"rank": 0}})
    with pytest.raises(openai.NotFoundError) as no_model:
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file="file-x")
    with service.client(project="elsewhere") as other, pytest.raises(openai.AuthenticationError) as wrong_project:
        other.files.list()
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="sk-x") as alien,
        pytest.raises(openai.AuthenticationError) as wrong_key,
    ):
        alien.models.list()
    with pytest.raises(openai.NotFoundError) as no_route:
        client.vector_stores.list()

    assert (bad_file.value.param, "Line 1" in bad_file.value.message) == ("file", True)
    assert (bad_rank.value.param, bad_rank.value.code) == ("lora.rank", "invalid_value")
    assert (no_model.value.param, no_model.value.code) == ("model", "model_not_found")
    assert wrong_project.value.code == "mismatched_project"
    assert wrong_key.value.type == "authentication_error"
    assert no_route.value.code == "unknown_route"
    assert all(error.value.request_id for error in (bad_file, bad_rank, no_model, wrong_key, no_route))


def test_openai_client_creates_one_job_if_a_response_is_lost(client: openai.OpenAI, service: Service) -> None:
    file = client.files.create(file=("x.jsonl", DATA), purpose="fine-tune")
    counts: list[str] = []

    class Lossy(httpx.HTTPTransport):
        """Loses the first response to a new job."""

        def handle_request(self, request: Any) -> Any:
            response = super().handle_request(request)
            if request.method == "POST":
                counts.append(request.headers["x-stainless-retry-count"])
                if len(counts) == 1:
                    response.read()
                    response.close()
                    raise httpx.ReadError("the connection broke")
            return response

    with service.client(http_client=httpx.Client(transport=Lossy())) as lossy:
        made = lossy.fine_tuning.jobs.create(model="smol", training_file=file.id, metadata={"lost": "reply"})

    jobs = list(client.fine_tuning.jobs.list(metadata={"lost": "reply"}))
    assert counts == ["0", "1"]
    assert [job.id for job in jobs] == [made.id]
