"""Requests go to a trainer that has the base model. One that is lost before the first token is replaced once.

tests/api/serving has the same for serving endpoints, and tests/system with real workers.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from api.deps import Services
from api.inference import exchange, trainer_search
from api.inference.answer import ClientGone, PartialAnswer
from api.inference.exchange import EngineRequest, Engines
from api.inference.vllm_client import VllmClient
from catalog.error_texts import ErrorText
from catalog.errors import LorryError, Unavailable
from catalog.inference import engines, requests
from catalog.inference.engines import INTERRUPTED, NOT_BEGUN
from catalog.queue.notifier import FileNotifier
from catalog.tasks import outcomes
from tests.api.fake_trainer import KEY, LOST, FakeTrainer, Json, Step, begun, failed, said, texts
from tests.api.inference.batch_service import used_tokens
from tests.api.site import Site, connect, until
from tests.catalog.world import LEASE, World

CHAT = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "smol", "prompt": "Hi"}
PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
ERROR = {"code": "base_broken", "message": "It is broken.", "remedy": "Repair it."}
Start = Callable[..., FakeTrainer]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_search, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(trainer_search, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(exchange, "AVOID_SECONDS", 0.05)


@pytest.fixture
def start(world: World, services: Services) -> Iterator[Start]:
    """Return a function that starts a worker with a loaded trainer."""
    with ExitStack() as stack:

        def start(script: Any = None, worker_id: str = "w1", *, is_loaded: bool = True) -> FakeTrainer:
            world.worker(worker_id)
            trainer = FakeTrainer(services.db, services.settings, script=script, worker_id=worker_id)
            trainer.start()
            stack.callback(trainer.close)
            if is_loaded:
                trainer.announce()
            return trainer

        yield start


def post(site: Site, body: Json, **changes: Any) -> httpx.Response:
    with site.http() as http:
        return http.post(PATHS["prompt" if "prompt" in body else "messages"], json=body | changes)


def background(act: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(act)
    pool.shutdown(wait=False)
    return future


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error_of(response: httpx.Response) -> Json:
    """Return the error of a response, or the one that ends its stream."""
    if response.headers["content-type"] == "application/json":
        return response.json()["error"]
    assert "[DONE]" not in response.text
    return json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))["error"]


def in_turn(*answers: Iterable[Step]) -> Callable[[Json], Iterable[Step]]:
    """Return a script that answers each request in another way, the last ones all alike."""
    remaining = list(answers)
    return lambda _: remaining.pop(0) if len(remaining) > 1 else remaining[0]


def is_wanted(services: Services) -> bool:
    return bool(engines.wanted(services.db, worker_id="w1"))


def test_trainer_answers(site: Site, services: Services, world: World, start: Start) -> None:
    trainer = start(lambda _: texts("Hel", "lo"))

    response = post(site, CHAT, max_tokens=7)

    assert text_of(response) == "Hello"
    assert response.headers["x-lorry-engine"] == "built-in"
    assert response.json()["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    (sent,) = trainer.requests
    assert (sent["messages"], sent["max_tokens"], sent["adapter"]) == (CHAT["messages"], 7, None)
    assert (sent["tenant"], sent["is_batch"]) == (
        services.pepper.digest(f"prefixes of {world.caller.project_id}"),
        False,
    )
    assert used_tokens(services.db, world) == (1, 2, 2)


def test_stream_of_a_trainer_is_complete(site: Site, start: Start) -> None:
    start(lambda _: texts("Hel", "lo"))

    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key) as client:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chunks: list[Any] = list(client.completions.create(**TEXT, **options))

    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hello"
    assert chunks[-1].usage.total_tokens == 4


def test_request_waits_until_a_worker_has_loaded_the_base_model(site: Site, services: Services, start: Start) -> None:
    trainer, notifications = start(is_loaded=False), FileNotifier(services.settings.notification_path())
    responses = [background(lambda: text_of(post(site, CHAT))) for _ in range(2)]
    until(lambda: is_wanted(services))

    trainer.announce()

    assert [response.result(30) for response in responses] == ["HI", "HI"]
    assert notifications.was_notified()


def test_outage_of_the_database_does_not_end_the_wait(
    site: Site, services: Services, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, failures = start(is_loaded=False), list[str]()
    response = background(lambda: post(site, CHAT))
    until(lambda: is_wanted(services))
    trainers_of = engines.trainers_of

    def away(*given: Any) -> Any:
        if len(failures) < 3:
            failures.append("away")
            raise Unavailable("database_unavailable")
        return trainers_of(*given)

    monkeypatch.setattr(engines, "trainers_of", away)
    until(lambda: len(failures) == 3)
    trainer.announce()

    assert text_of(response.result(30)) == "HI"


@pytest.mark.parametrize("how", ["unloads", "other secret", "gone"])
def test_trainer_that_accepts_no_requests_is_followed_by_another(site: Site, start: Start, how: str) -> None:
    first, second = start(), start(worker_id="w2")
    if how == "unloads":
        first.accepts = False
    elif how == "gone":
        first.close()
    else:
        first.secret = "that of the next trainer"

    assert [text_of(post(site, CHAT)) for _ in range(4)] == ["HI"] * 4

    assert (len(first.requests), len(second.requests)) == (0, 4)


def test_request_that_a_trainer_returns_is_sent_until_one_begins_it(site: Site, start: Start) -> None:
    trainer = start(in_turn(*[[failed(NOT_BEGUN)]] * 4, texts("Hello")))

    assert text_of(post(site, CHAT)) == "Hello"

    assert len(trainer.requests) == 5


LOSSES = {
    "before it began": [LOST],
    "before the first token": [begun(), LOST],
    "trainer before the first token": [begun(), failed(INTERRUPTED)],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_worker_that_is_lost_before_the_first_token_is_replaced_once(
    site: Site, services: Services, world: World, start: Start, loss: str, stream: bool
) -> None:
    lost = LOSSES[loss]
    trainer = start(in_turn(lost, texts("Hello"), lost))

    answered, interrupted = post(site, CHAT, stream=stream), post(site, CHAT, stream=stream)

    assert answered.status_code == 200
    assert "Hello" in answered.text
    assert interrupted.status_code == 503
    assert error_of(interrupted)["code"] == "answer_interrupted"
    assert len(trainer.requests) == 4
    assert used_tokens(services.db, world) == (1, 2, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lost", [LOST, failed(INTERRUPTED)], ids=["worker", "trainer"])
def test_answer_of_a_worker_that_is_lost_later_is_interrupted_and_counted(
    site: Site, services: Services, world: World, start: Start, lost: Json, stream: bool
) -> None:
    trainer = start(lambda _: [begun(), said("a"), said("b", 2), lost])

    response = post(site, CHAT, stream=stream)

    assert response.status_code == (200 if stream else 503)
    error = error_of(response)
    assert (error["code"], error["message"]) == (
        "answer_interrupted",
        "The engine did not complete the answer. Send the request again.",
    )
    assert len(trainer.requests) == 1
    until(lambda: used_tokens(services.db, world) == (1, 2, 2))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "code", "status", "param"),
    [
        (CHAT, "context_length_exceeded", 400, "messages"),
        (TEXT, "context_length_exceeded", 400, "prompt"),
        (CHAT, "template_without_tools", 400, "tools"),
        (CHAT, "disk_error", 503, None),
        (CHAT, "inference_failed", 503, None),
    ],
)
def test_error_of_a_worker_reaches_the_client(
    site: Site, start: Start, body: Json, code: str, status: int, param: str | None, stream: bool
) -> None:
    trainer = start(lambda _: [failed(code)])

    response = post(site, body, stream=stream)

    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["message"] == "It is wrong. Do better."
    assert len(trainer.requests) == 1


def test_error_after_the_first_token_is_sent_in_the_stream(site: Site, start: Start) -> None:
    start(lambda _: [begun(), said("a"), failed("out_of_memory")])

    response = post(site, CHAT, stream=True)

    assert response.status_code == 200
    assert error_of(response)["code"] == "out_of_memory"


@pytest.mark.parametrize(
    ("code", "num_requests"), [("inference_failed", 1), ("unsupported_adapter", 1), ("disk_error", 2)]
)
def test_openai_client_repeats_only_errors_that_another_worker_may_not_have(
    site: Site, start: Start, code: str, num_requests: int
) -> None:
    trainer, messages = start(lambda _: [failed(code)]), CHAT["messages"]

    with (
        openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=1) as client,
        pytest.raises(openai.APIStatusError) as raised,
    ):
        client.chat.completions.create(model="smol", messages=messages)  # pyright: ignore

    assert (raised.value.status_code, raised.value.code) == (503, code)
    assert len(trainer.requests) == num_requests


def fail_load(services: Services) -> None:
    until(lambda: is_wanted(services))
    claimed = engines.reserve(services.db, KEY, worker_id="w1", lease_seconds=LEASE)
    assert claimed is not None
    outcomes.fail(services.db, claimed, engines.LOAD, ErrorText(**ERROR))


def test_error_of_a_load_reaches_all_clients_that_wait(site: Site, services: Services, start: Start) -> None:
    start(is_loaded=False)
    waiting = [background(lambda: post(site, CHAT)) for _ in range(2)]
    until(lambda: services.engines._num_open.total() == 2)  # pyright: ignore[reportPrivateUsage]

    fail_load(services)

    for response in waiting:
        found = response.result(30)
        assert (found.status_code, error_of(found)["code"]) == (503, "base_broken")


def test_request_that_follows_a_failed_load_lets_a_worker_try_again(
    site: Site, services: Services, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_search, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(trainer_search, "LOOK_SECONDS", 1.0)  # the next request begins before the next look
    trainer = start(is_loaded=False)
    failing = background(lambda: post(site, CHAT))
    fail_load(services)
    assert failing.result(30).status_code == 503

    following = background(lambda: post(site, CHAT))

    until(lambda: is_wanted(services))
    trainer.announce()
    assert text_of(following.result(30)) == "HI"


@pytest.mark.usefixtures("world")
def test_without_a_worker_a_request_is_refused_at_once(site: Site) -> None:
    response = post(site, CHAT)

    assert (response.status_code, error_of(response)["code"]) == (503, "inference_timeout")


def test_tools_that_the_template_does_not_render_are_refused_without_a_worker(site: Site, world: World) -> None:
    world.base("plain", renders_tools=False)
    tools = [{"type": "function", "function": {"name": "paint", "parameters": {}}}]

    response = post(site, CHAT, model="plain", tools=tools)

    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "template_without_tools", "tools")
    assert "--chat-template" in error["message"]


def test_number_of_open_requests_of_a_project_is_limited(
    site: Site, start: Start, stranger_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "MAX_OPEN", 1)
    released = threading.Event()
    trainer = start(lambda _: [released, *texts("Hello")])
    first = background(lambda: post(site, CHAT))
    until(lambda: len(trainer.requests) == 1)

    refused = post(site, CHAT)
    other = background(lambda: post(replace(site, key=stranger_key), CHAT))
    until(lambda: len(trainer.requests) == 2)
    released.set()

    assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_requests")
    assert [text_of(each.result(30)) for each in (first, other)] == ["Hello"] * 2
    assert text_of(post(site, CHAT)) == "Hello"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [[], [begun()], [begun(), said("a")]], ids=["accepted", "begun", "generating"])
def test_answer_ends_when_its_client_disconnects(
    site: Site, services: Services, world: World, start: Start, before: list[Json], stream: bool
) -> None:
    has_arrived = threading.Event()

    def script(_: Json) -> Iterator[Step]:
        yield from before
        has_arrived.set()
        yield threading.Event()

    trainer = start(script)
    with closing(send(site, {**CHAT, "stream": stream})):
        assert has_arrived.wait(30)

    until(lambda: trainer.stopped == ["Hi"])
    until(lambda: used_tokens(services.db, world)[:2] == ((1, 2) if before else (0, 0)))


def test_client_that_leaves_before_the_base_model_is_loaded_ends_its_request(
    site: Site, services: Services, start: Start
) -> None:
    trainer = start(is_loaded=False)
    with closing(send(site, CHAT)):
        until(lambda: is_wanted(services))
    until(lambda: not services.engines._num_open)  # pyright: ignore[reportPrivateUsage]

    trainer.announce()

    assert text_of(post(site, CHAT, messages=[{"role": "user", "content": "Next"}])) == "NEXT"
    assert trainer.prompts == ["Next"]


@pytest.mark.parametrize("leaves", [True, False])
def test_client_that_never_reads_is_abandoned(
    site: Site, start: Start, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Its request ends, even if the client stays connected."""
    monkeypatch.setattr("api.routes.inference.SEND_SECONDS", 600.0 if leaves else 0.5)
    has_sent = threading.Event()

    def script(_: Json) -> Iterator[Step]:
        yield begun()
        yield from (said("x" * 50_000, number) for number in range(1, 200))
        has_sent.set()
        yield threading.Event()

    trainer = start(script)
    with closing(send(site, {**CHAT, "stream": True})) as client:
        assert has_sent.wait(30)
        if leaves:
            client.close()
        until(lambda: trainer.stopped == ["Hi"])


def send(site: Site, body: Json) -> socket.socket:
    """Send a request. Returns its connection, from which nothing is read."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {site.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    client = connect(site)
    client.sendall(head.encode() + content)
    return client


def test_answer_that_is_too_large_fails_and_is_stopped(
    site: Site, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.inference.answer.MAX_KEPT_BYTES", 2000)
    token = {"token": "x", "logprob": -1.0, "bytes": [120]}
    part = said("x", logprobs=[{**token, "top_logprobs": [token] * 20}])
    trainer = start(lambda _: [begun(), *[part] * 3, threading.Event()])

    response = post(site, CHAT, logprobs=True, top_logprobs=20)

    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "answer_too_large", "logprobs")
    until(lambda: trainer.stopped == ["Hi"])


def test_api_server_that_stops_ends_its_requests(site: Site, start: Start) -> None:
    trainer = start(lambda _: [begun(), threading.Event()])
    response = background(lambda: post(site, CHAT))
    until(lambda: len(trainer.requests) == 1)

    site.server.should_exit = True

    until(lambda: trainer.stopped == ["Hi"])
    assert response.exception(30) is not None or response.result().status_code >= 500


class Direct:
    """Engines in an event loop of a test."""

    def __init__(self, services: Services, world: World) -> None:
        self._db, self._project_id = services.db, world.caller.project_id
        self.engines = Engines(services.db, pepper=services.pepper, notifier=services.notifier, client=VllmClient())

    def request(self, model: str = "smol", **given: Any) -> EngineRequest:
        found = requests.resolve(self._db, project_id=self._project_id, name=model)
        sampling = {"n": 1, "temperature": 0.0, "top_p": 1.0, "seed": 1, "stop": [], "num_logprobs": None}
        penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        parameters = {"prompts": ["Hi"], "max_tokens": 4, **sampling, **penalties}
        return EngineRequest(
            project_id=self._project_id, model=found, parameters=parameters, gone=asyncio.Event(), **given
        )

    async def ask(self, request: EngineRequest) -> str:
        async with self.engines.answering(request, PartialAnswer()) as deltas:
            return "".join([delta.text async for delta in deltas])


@pytest.fixture
def direct(services: Services, world: World) -> Direct:
    return Direct(services, world)


@pytest.mark.parametrize(
    ("is_loaded", "reason"), [(False, "no worker has 'smol' loaded"), (True, "are busy with other requests")]
)
def test_request_without_a_first_token_fails_in_time(
    direct: Direct, start: Start, is_loaded: bool, reason: str
) -> None:
    start(lambda _: [begun(), threading.Event()], is_loaded=is_loaded)

    async def ask() -> None:
        with pytest.raises(LorryError) as refused:
            await direct.ask(direct.request(wait_seconds=0.3))
        assert (refused.value.status, refused.value.code) == (503, "inference_timeout")
        assert reason in refused.value.message
        await direct.engines.close()

    asyncio.run(ask())


def test_requests_that_wait_for_a_base_model_delay_no_others(
    services: Services, world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "MAX_CONNECTIONS", 1)
    world.base("other")
    start()
    direct = Direct(services, world)

    async def ask() -> str:
        waiting = direct.request("other")
        task = asyncio.create_task(direct.ask(waiting))
        while not any(row.base_model == "other" for row in engines.wanted(services.db, worker_id="w1")):
            await asyncio.sleep(0.01)
        text = await direct.ask(direct.request())
        waiting.gone.set()
        with pytest.raises(ClientGone):
            await task
        await direct.engines.close()
        return text

    assert asyncio.run(ask()) == "HI"


def test_lines_of_batches_do_not_count_as_open_requests(
    direct: Direct, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "MAX_OPEN", 1)
    released = threading.Event()
    trainer = start(lambda _: [released, *texts("Hello")])

    async def ask() -> list[str]:
        batch = [asyncio.create_task(direct.ask(direct.request(is_batch=True))) for _ in range(2)]
        while len(trainer.requests) < 2:
            await asyncio.sleep(0.01)
        client = asyncio.create_task(direct.ask(direct.request()))
        while len(trainer.requests) < 3:
            await asyncio.sleep(0.01)
        released.set()
        answers = await asyncio.gather(*batch, client)
        await direct.engines.close()
        return answers

    assert asyncio.run(ask()) == ["Hello"] * 3
    assert [request["is_batch"] for request in trainer.requests] == [True, True, False]
