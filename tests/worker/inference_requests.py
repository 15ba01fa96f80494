"""Inference requests to a worker's HTTP server, and the trainer's end of its pipes."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from typing import Any

import httpx

from catalog.inference import engines, requests
from tests.worker.pack_site import PackSite
from tests.worker_site import wait_until
from worker.inference.session import InferenceSession
from worker.protocol import answer_pipes
from worker.protocol.answer_pipes import Lines, TrainerPipes
from worker.protocol.mailbox import TrainerDirectory, TrainerMessage
from worker.session.trainer_session import TrainerSession

FIELDS: dict[str, Any] = {
    **{"model": "smol", "n": 1, "seed": 1, "temperature": 0.0, "top_p": 1.0},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
}
CHAT = "/v1/chat/completions"


class Asked:
    """A request, whose response a thread reads."""

    def __init__(
        self, site: PackSite, session: InferenceSession, path: str = CHAT, *, secret: str | None = None, **fields: Any
    ) -> None:
        self.status: int | None = None
        self.events: list[str] = []
        """The lines of the stream that are not empty."""
        self._url = f"http://{site.context.inference_server.address}{path}"
        self._key = session.secret if secret is None else secret
        self._body = FIELDS | ({"messages": []} if path == CHAT else {"prompt": [""], "max_tokens": 4}) | fields
        self._response: httpx.Response | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        key = {"authorization": f"Bearer {self._key}"}
        with (
            suppress(httpx.HTTPError),
            httpx.Client(trust_env=False, timeout=60) as client,
            client.stream("POST", self._url, json=self._body, headers=key) as self._response,
        ):
            self.status = self._response.status_code
            self.events += (line for line in self._response.iter_lines() if line)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return [json.loads(line.removeprefix("data: ")) for line in self.events if line.startswith("data: {")]

    @property
    def error(self) -> dict[str, Any]:
        return self.chunks[-1]["error"]

    def wait_until_accepted(self) -> Asked:
        wait_until(lambda: self.status is not None)
        return self

    def disconnect(self) -> None:
        self.wait_until_accepted()
        assert self._response is not None
        self._response.extensions["network_stream"].get_extra_info("socket").shutdown(2)


class TrainerEnd:
    """The trainer's end of the pipes."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._pipes = TrainerPipes(directory.requests_path, directory.tokens_path)

    def take(self, number: int = 1) -> list[TrainerMessage]:
        """Return the next messages, as soon as there are this many."""
        found: list[TrainerMessage] = []

        def is_enough() -> bool:
            found.extend(self._pipes.take())
            return len(found) >= number

        wait_until(is_enough)
        return found

    def takes_nothing(self) -> bool:
        return not self._pipes.wait(0.2)

    def begin(self, message: TrainerMessage) -> None:
        generation = {"text": {"end_ids": [0]}}
        self.write("answering", message, prompt_tokens=3, generation=generation)

    def answer(self, message: TrainerMessage, *deltas: dict[str, Any]) -> None:
        """Write some deltas, and the end of the answer."""
        if deltas:
            self.generate(message, *deltas)
        self.write("answered", message, completion_tokens=1)

    def generate(self, message: TrainerMessage, *deltas: dict[str, Any]) -> None:
        written = [{"index": 0, "text": "", "num_tokens": 1} | delta for delta in deltas]
        self.write("generated", message, deltas=written, completion_tokens=1)

    def write(self, kind: str, message: TrainerMessage, **fields: Any) -> None:
        self._pipes.write({"type": kind, "request_id": message.body["request_id"], **fields})

    def write_raw(self, event: Any) -> None:
        self._pipes.write(event)


def want(site: PackSite, *, name: str = "smol", is_batch: bool = False) -> str:
    """Record that requests wait for the base model. Returns its pack key."""
    model = requests.resolve(site.db, project_id=site.world.caller.project_id, name=name)
    assert engines.want(site.db, model, since=float("inf"), is_batch=is_batch) is None
    return model.pack_key


def is_fault_noticed(session: TrainerSession) -> bool:
    session.serve_requests()
    return session.fault is not None


class WorkerEnd:
    """The worker's end of the pipes, for a trainer in the same thread."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._requests, tokens = answer_pipes._opened(directory.requests_path), directory.tokens_path
        self._lines = Lines(answer_pipes._opened(tokens))

    def send(self, verb: str, **body: Any) -> None:
        os.write(self._requests, json.dumps({"verb": verb, "body": body}).encode() + b"\n")

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines.read()]
