"""Faults while a trainer answers inference requests: a killed worker, trainer or API server, and a client that does not
read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from catalog.inference.engines import INTERRUPTED
from catalog.states import JobState
from qa.chaos.environment import fault
from qa.chaos.service import PATIENCE_SECONDS, FaultSite
from tests.worker_site import BASE

PATH = "/v1/chat/completions"
QUESTION: dict[str, Any] = {
    "model": BASE,
    "messages": [{"role": "user", "content": "What color is the lorry?"}],
    "temperature": 1.8,
    "seed": 4,
    "max_tokens": 180,
}
LARGE = {"n": 16, "logprobs": True, "top_logprobs": 20, "max_tokens": 200}
"""An answer of many megabytes, more than sockets buffer."""
INTERRUPTS = "the client gets an error that it may retry; the next request gets the whole answer; the job succeeds"
NUM_BEFORE_FAULT = 3
"""Chunks that the client has read when the fault is injected."""


class _Interrupted(Exception):
    """The stream ended with an error. Its argument is the code."""


@contextmanager
def _streaming(site: FaultSite, **changes: Any) -> Generator[Iterator[str]]:
    """Open a stream, and yield the pieces of its answer."""
    headers = {"authorization": f"Bearer {site.key}"}
    body = {**QUESTION, "stream": True, **changes}
    with (
        httpx.Client(base_url=site.url, trust_env=False, timeout=PATIENCE_SECONDS) as client,
        client.stream("POST", PATH, json=body, headers=headers) as response,
    ):
        if response.status_code != 200:
            raise AssertionError(f"status {response.status_code}: {response.read().decode()}\n{site.log()}")
        yield _pieces(response)


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data and data != "[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise _Interrupted(chunk["error"]["code"])
            yield "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _answer(site: FaultSite) -> str:
    response = site.ask("POST", PATH, json=QUESTION, timeout=PATIENCE_SECONDS)
    assert response.status_code == 200, f"{response.text}\n{site.log()}"
    return str(response.json()["choices"][0]["message"]["content"])


def _begin(site: FaultSite) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Start an API server and a worker. Returns them when the worker is live."""
    api, worker = site.start_api(), site.start_worker()
    site.wait_until(lambda: any(one["state"] == "idle" for one in site.ask("GET", "/v1/workers").json()["data"]))
    return api, worker


@fault(
    "inference-worker-killed",
    "kill -9 of the worker during an answer, while a job trains",
    promise=INTERRUPTS,
    given={"of_trainer": False},
)
@fault(
    "inference-trainer-killed",
    "kill -9 of the trainer during an answer, while a job trains",
    promise=INTERRUPTS,
    given={"of_trainer": True},
)
def kill_in_answer(site: FaultSite, *, of_trainer: bool) -> str:
    _, worker = _begin(site)
    site.wait_for_success(site.submit_small())
    whole = _answer(site)  # in the precision of the job, which has loaded the base model
    job_id = site.submit_small(max_steps=2000, checkpoint_every_steps=100)  # still trains after a few tokens
    site.wait_for_step(1, job_id)
    code = None
    with _streaming(site) as pieces:
        for _ in range(NUM_BEFORE_FAULT):
            next(pieces)
        assert site.job(job_id).state == JobState.RUNNING, "the job ended before the fault"
        (site.trainer_of(worker) if of_trainer else worker).kill()
        if not of_trainer:
            site.start_worker()
        try:
            for _ in pieces:
                pass
        except _Interrupted as error:
            code = error.args[0]

    assert code == INTERRUPTED, f"the incomplete answer ended with {code}"
    site.wait_until(lambda: len(site.attempts(job_id)) > 1)
    before = site.job(job_id).progress
    site.wait_until(lambda: site.job(job_id).progress != before)  # it has loaded the base model in its precision again
    assert _answer(site) == whole, "the answer changed"
    site.wait_for_success(job_id, is_small=False)
    return f"{code}; the next request is answered; the job: {site.attempts_text(job_id)}"


@fault(
    "inference-api-killed",
    "kill -9 of the API server during an answer",
    promise="the client gets an error; the next API server answers",
)
def kill_api_in_answer(site: FaultSite) -> str:
    api, _ = _begin(site)
    whole = _answer(site)
    lost = ""
    try:
        with _streaming(site) as pieces:
            for _ in range(NUM_BEFORE_FAULT):
                next(pieces)
            api.kill()
            api.wait()
            for _ in pieces:
                pass
    except httpx.TransportError as error:
        lost = type(error).__name__
    assert lost, "the client got no error, although the answer is incomplete"

    site.start_api()
    assert _answer(site) == whole
    return f"{lost}; the next API server answers"


@fault(
    "inference-client-never-reads",
    "a client opens a stream of many megabytes, and reads nothing",
    promise="other clients get their answers",
)
def never_read(site: FaultSite) -> str:
    _begin(site)
    whole = _answer(site)
    with _streaming(site, **LARGE):
        answers = [_answer(site) for _ in range(3)]
    assert answers == [whole] * 3
    return "3 other answers while it stays connected"
