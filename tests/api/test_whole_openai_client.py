"""Every public method of the openai client that Lorry supports, sync and async, with strict response validation.

A new method of a later client fails this test until it is in CALLS or NOT_OFFERED.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from openai._base_client import AsyncPaginator, BaseSyncPage
from openai._resource import AsyncAPIResource, SyncAPIResource

from api.deps import Services
from catalog.lifecycle import recording
from catalog.storage import multipart_uploads
from catalog.webhooks import signing
from catalog.webhooks.outbox import EVENT_TYPES
from tests.api.hook_receiver import Receiver
from tests.api.site import Site, chat_lines
from tests.api.trained import stored_weights
from tests.catalog.world import World, manifest

RESOURCES = ("files", "uploads", "batches", "fine_tuning", "models", "webhooks")
DATA = chat_lines(3)
UPLOAD = {"bytes": len(DATA), "filename": "u.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}


@dataclass(kw_only=True)
class Have:
    """The resources that calls can use, and the results of the previous calls."""

    job: str
    model: str
    checkpoint: str
    hook: str
    """The URL of the webhook receiver."""
    upload: str
    """An open upload, to be cancelled."""
    requests: str
    """An input file of a batch."""
    other: str
    """Another project."""
    answers: dict[str, Any] = field(default_factory=dict[str, Any])

    def id(self, method: str) -> str:
        return self.answers[method].id


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of a method, and a check of its result."""

    given: Callable[[Have], dict[str, Any]]
    holds: Callable[[Any, Have], object]
    raises: type[Exception] | None = None
    is_operators: bool = False
    """Use an operator key, where OpenAI requires an admin key."""


def signed(have: Have) -> dict[str, Any]:
    """Return a webhook message signed with the rotated secret."""
    secret = have.answers["webhooks.rotate_secret"].signing_secret
    body = b'{"object":"event","id":"evt-1","type":"fine_tuning.job.failed","created_at":1,"data":{"id":"j"}}'
    headers = signing.headers(body, message_id="evt-1", at=time.time(), signed_with=[secret])
    return {"payload": body, "headers": headers, "secret": secret}


def permission(have: Have) -> Any:
    """Return the permission that was created."""
    return have.answers["fine_tuning.checkpoints.permissions.create"][0]


OF_A_CHECKPOINT: Callable[[Have], dict[str, Any]] = lambda have: {"fine_tuned_model_checkpoint": have.checkpoint}  # noqa: E731
CALLS: dict[str, Call] = {
    "files.create": Call(
        given=lambda _: {
            "file": ("a.jsonl", DATA),
            "purpose": "fine-tune",
            "expires_after": {"anchor": "created_at", "seconds": 3600},
        },
        holds=lambda file, _: file.expires_at == file.created_at + 3600,
    ),
    "files.retrieve": Call(
        given=lambda have: {"file_id": have.id("files.create")},
        holds=lambda file, have: file == have.answers["files.create"],
    ),
    "files.list": Call(
        given=lambda _: {"limit": 1, "order": "asc", "purpose": "fine-tune"},
        holds=lambda files, have: have.id("files.create") in [file.id for file in files],
    ),
    "files.content": Call(
        given=lambda have: {"file_id": have.id("files.create")}, holds=lambda answer, _: answer.content == DATA
    ),
    "files.retrieve_content": Call(
        given=lambda have: {"file_id": have.id("files.create")}, holds=lambda text, _: text == DATA.decode()
    ),
    "files.wait_for_processing": Call(
        given=lambda have: {"id": have.id("files.create")}, holds=lambda file, _: file.status == "processed"
    ),
    "uploads.create": Call(given=lambda _: dict(UPLOAD), holds=lambda upload, _: upload.status == "pending"),
    "uploads.parts.create": Call(
        given=lambda have: {"upload_id": have.id("uploads.create"), "data": DATA},
        holds=lambda part, have: part.upload_id == have.id("uploads.create"),
    ),
    "uploads.complete": Call(
        given=lambda have: {
            "upload_id": have.id("uploads.create"),
            "part_ids": [have.id("uploads.parts.create")],
            "md5": hashlib.md5(DATA).hexdigest(),
        },
        holds=lambda upload, _: (upload.status, upload.file.bytes) == ("completed", len(DATA)),
    ),
    "uploads.cancel": Call(
        given=lambda have: {"upload_id": have.upload}, holds=lambda upload, _: upload.status == "cancelled"
    ),
    "uploads.upload_file_chunked": Call(
        given=lambda _: {"file": DATA, **UPLOAD, "part_size": 100},
        holds=lambda upload, _: (upload.status, upload.file.bytes) == ("completed", len(DATA)),
    ),
    "batches.create": Call(
        given=lambda have: {
            "input_file_id": have.requests,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {"team": "search"},
            "output_expires_after": {"anchor": "created_at", "seconds": 3600},
        },
        holds=lambda batch, _: (batch.status, batch.metadata) == ("validating", {"team": "search"}),
    ),
    "batches.retrieve": Call(
        given=lambda have: {"batch_id": have.id("batches.create")},
        holds=lambda batch, have: batch.input_file_id == have.requests,
    ),
    "batches.list": Call(
        given=lambda _: {"limit": 1}, holds=lambda found, have: found[0].id == have.id("batches.create")
    ),
    "batches.cancel": Call(
        given=lambda have: {"batch_id": have.id("batches.create")},
        holds=lambda batch, _: batch.status == "cancelling",
    ),
    "fine_tuning.jobs.create": Call(
        given=lambda have: {
            "model": "smol",
            "training_file": have.id("files.create"),
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
            "metadata": {"team": "search"},
        },
        holds=lambda job, _: job.hyperparameters.n_epochs == 3,
    ),
    "fine_tuning.jobs.retrieve": Call(
        given=lambda have: {"fine_tuning_job_id": have.job},
        holds=lambda job, have: (job.fine_tuned_model, len(job.result_files)) == (have.model, 1),
    ),
    "fine_tuning.jobs.list": Call(
        given=lambda _: {"limit": 1, "metadata": {"team": "search"}},
        holds=lambda jobs, have: [job.id for job in jobs] == [have.id("fine_tuning.jobs.create")],
    ),
    "fine_tuning.jobs.list_events": Call(
        given=lambda have: {"fine_tuning_job_id": have.job, "limit": 2},
        holds=lambda events, _: {event.type for event in events} == {"message", "metrics"},
    ),
    "fine_tuning.jobs.checkpoints.list": Call(
        given=lambda have: {"fine_tuning_job_id": have.job},
        holds=lambda found, have: [one.fine_tuned_model_checkpoint for one in found] == [have.checkpoint],
    ),
    "fine_tuning.jobs.pause": Call(
        given=lambda have: {"fine_tuning_job_id": have.id("fine_tuning.jobs.create")},
        holds=lambda error, _: "paused" in str(error.body),
        raises=openai.APIResponseValidationError,  # the client's own list of statuses has no `paused`
    ),
    "fine_tuning.jobs.resume": Call(
        given=lambda have: {"fine_tuning_job_id": have.id("fine_tuning.jobs.create")},
        holds=lambda job, _: job.status == "validating_files",
    ),
    "fine_tuning.jobs.cancel": Call(
        given=lambda have: {"fine_tuning_job_id": have.id("fine_tuning.jobs.create")},
        holds=lambda job, _: job.status == "cancelled",
    ),
    "files.delete": Call(
        given=lambda have: {"file_id": have.id("files.create")}, holds=lambda answer, _: answer.deleted is True
    ),
    "fine_tuning.checkpoints.permissions.create": Call(
        given=lambda have: {**OF_A_CHECKPOINT(have), "project_ids": [have.other]},
        holds=lambda given, _: [one.object for one in given] == ["checkpoint.permission"],
        is_operators=True,
    ),
    "fine_tuning.checkpoints.permissions.retrieve": Call(
        given=lambda have: {**OF_A_CHECKPOINT(have), "limit": 1, "order": "ascending"},
        holds=lambda page, have: [one.id for one in page.data] == [permission(have).id],
        is_operators=True,
    ),
    "fine_tuning.checkpoints.permissions.list": Call(
        given=lambda have: {**OF_A_CHECKPOINT(have), "project_id": permission(have).project_id},
        holds=lambda found, have: [one.id for one in found] == [permission(have).id],
        is_operators=True,
    ),
    "fine_tuning.checkpoints.permissions.delete": Call(
        given=lambda have: {**OF_A_CHECKPOINT(have), "permission_id": permission(have).id},
        holds=lambda answer, _: answer.deleted is True,
        is_operators=True,
    ),
    "models.retrieve": Call(
        given=lambda have: {"model": have.checkpoint}, holds=lambda model, have: model.id == have.checkpoint
    ),
    "models.list": Call(
        given=lambda _: {}, holds=lambda models, have: {"smol", have.model} <= {model.id for model in models}
    ),
    "models.delete": Call(given=lambda have: {"model": have.model}, holds=lambda answer, have: answer.id == have.model),
    "webhooks.event_types.list": Call(given=lambda _: {}, holds=lambda types, _: types.data == list(EVENT_TYPES)),
    "webhooks.create": Call(
        given=lambda have: {"event_types": ["fine_tuning.job.failed"], "name": "ops", "url": have.hook},
        holds=lambda hook, have: hook.signing_secret.startswith("whsec_") and hook.url == have.hook,
    ),
    "webhooks.retrieve": Call(
        given=lambda have: {"webhook_endpoint_id": have.id("webhooks.create")},
        holds=lambda hook, have: hook.id == have.id("webhooks.create") and hook.signing_secret_hint,
    ),
    "webhooks.list": Call(
        given=lambda _: {"limit": 1},
        holds=lambda hooks, have: [hook.id for hook in hooks] == [have.id("webhooks.create")],
    ),
    "webhooks.update": Call(
        given=lambda have: {"webhook_endpoint_id": have.id("webhooks.create"), "name": "new"},
        holds=lambda hook, _: (hook.name, hook.event_types) == ("new", ["fine_tuning.job.failed"]),
    ),
    "webhooks.rotate_secret": Call(
        given=lambda have: {
            "webhook_endpoint_id": have.id("webhooks.create"),
            "keep_old_secret_active_for_24_hours": True,
        },
        holds=lambda hook, have: hook.signing_secret != have.answers["webhooks.create"].signing_secret,
    ),
    "webhooks.test": Call(
        given=lambda have: {
            "webhook_endpoint_id": have.id("webhooks.create"),
            "event_type": "fine_tuning.job.succeeded",
        },
        holds=lambda result, _: result.status_code == 204,
    ),
    "webhooks.verify_signature": Call(given=signed, holds=lambda answer, _: answer is None),
    "webhooks.unwrap": Call(given=signed, holds=lambda event, _: event.type == "fine_tuning.job.failed"),
    "webhooks.delete": Call(
        given=lambda have: {"webhook_endpoint_id": have.id("webhooks.create")},
        holds=lambda answer, _: answer.deleted is True,
    ),
}
GRADER = {"type": "string_check", "name": "n", "input": "a", "reference": "a", "operation": "eq"}
NOT_OFFERED: dict[str, Callable[[Have], dict[str, Any]]] = {
    "fine_tuning.alpha.graders.run": lambda _: {"grader": GRADER, "model_sample": "a"},
    "fine_tuning.alpha.graders.validate": lambda _: {"grader": GRADER},
}


class Client:
    """Calls a client's methods by name, awaits the results, and reads lists to the end."""

    def __init__(self, client: openai.OpenAI | openai.AsyncOpenAI, run: Callable[[Any], Any]) -> None:
        self.client, self._run = client, run

    def methods(self, key: str | None = None) -> dict[str, Callable[..., Any]]:
        client = self.client if key is None else self.client.with_options(api_key=key)
        return {
            name: method for resource in RESOURCES for name, method in _methods(getattr(client, resource), resource)
        }

    def call(self, name: str, given: dict[str, Any], key: str | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from deprecated methods of the client
            answer = self.methods(key)[name](**given)
        if isinstance(answer, AsyncPaginator) or inspect.isawaitable(answer):
            return self._run(_awaited(answer))
        return list(answer) if isinstance(answer, BaseSyncPage) else answer


async def _awaited(answer: Any) -> Any:
    return [item async for item in answer] if isinstance(answer, AsyncPaginator) else await answer


def _methods(resource: object, path: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in dir(type(resource)):
        if name.startswith(("_", "with_raw_", "with_streaming_")):
            continue
        value = getattr(resource, name)
        if isinstance(value, SyncAPIResource | AsyncAPIResource):
            yield from _methods(value, f"{path}.{name}")
        elif callable(value):
            yield f"{path}.{name}", value


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, site: Site) -> Iterator[Client]:
    given: dict[str, Any] = {"base_url": f"{site.url}/v1", "api_key": site.key, "max_retries": 0}
    if request.param == "sync":
        with openai.OpenAI(**given, _strict_response_validation=True) as strict:
            yield Client(strict, lambda _: None)
        return
    with asyncio.Runner() as runner:
        strict = openai.AsyncOpenAI(**given, _strict_response_validation=True)
        yield Client(strict, runner.run)
        runner.run(strict.close())


@pytest.fixture
def have(world: World, services: Services, receiver: Receiver, tmp_path: Path) -> Have:
    world.worker()
    claim = world.running()
    point = {"kind": "train", "step": 1, "loss": 2.0, "token_accuracy": 0.5}
    recording.record_metrics(world.db, claim.claim_id, [point])
    files, exported = manifest("c", kind="checkpoint"), stored_weights(services, tmp_path / "weights")
    recording.record_checkpoint(world.db, claim.claim_id, step=1, artifact=files, exported=exported)
    model = world.complete(claim.claim_id).name
    upload = multipart_uploads.create(
        world.db,
        project_id=world.caller.project_id,
        purpose="user_data",
        filename="a",
        num_bytes=1,
        lifetime_seconds=None,
        settings=services.settings,
    )
    return Have(
        job=claim.job.id,
        model=model,
        checkpoint=f"{model}:ckpt-step-1",
        upload=upload.upload.id,
        requests=world.file(purpose="batch", num_rows=None),
        other="theirs",
        hook=f"{receiver.url}/",
    )


def outcome(client: Client, name: str, call: Call, have: Have, operator_key: str) -> Any:
    """Return the result or the expected error."""
    if call.raises is None:
        return client.call(name, call.given(have), operator_key if call.is_operators else None)
    with pytest.raises(call.raises) as raised:
        client.call(name, call.given(have))
    return raised.value


def test_every_client_method_succeeds_or_is_not_supported(client: Client, have: Have, operator_key: str) -> None:
    for name, call in CALLS.items():
        have.answers[name] = answer = outcome(client, name, call, have, operator_key)
        assert call.holds(answer, have), (name, answer)
    for name, given in NOT_OFFERED.items():
        with pytest.raises(openai.NotFoundError) as refused:
            client.call(name, given(have))
        assert refused.value.code == "not_supported", name

    assert set(client.methods()) == CALLS.keys() | NOT_OFFERED.keys()


def test_raw_and_streaming_responses_work(site: Site, have: Have) -> None:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, _strict_response_validation=True) as client:
        raw = client.fine_tuning.jobs.with_raw_response.retrieve(have.job)
        made = client.files.create(file=("a.jsonl", DATA), purpose="fine-tune")
        with client.files.with_streaming_response.content(made.id) as streamed:
            pieces = list(streamed.iter_bytes(50))

    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().id == have.job
    assert b"".join(pieces) == DATA


@pytest.mark.parametrize("path", ["responses", "embeddings", "responses/x/cancel", "images/generations"])
def test_other_inference_routes_are_not_supported_and_name_those_that_are(site: Site, path: str) -> None:
    with site.http() as http:
        refused = http.post(f"/v1/{path}", json={}).json()["error"]

    assert refused["code"] == "not_supported"
    assert "/v1/chat/completions" in refused["remedy"]
