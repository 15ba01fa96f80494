"""Long prompts of clients delay training by no more than the share of inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lora_core.base_model.model import load_base
from lora_core.distributed.ranks import ALONE, Ranks
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from tests import tiny_base
from tests.worker.inference_requests import WorkerEnd
from tests.worker.pack_site import events_in
from tests.worker.trainer_settings import trainer_settings
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.trainer import inference, main
from worker.children.trainer.inference import TOKEN_CHARS, InferenceRequests, TimeShare
from worker.children.trainer.message_handlers import MessageHandlers
from worker.children.trainer.message_queue import ANSWER_CHARS, MessageQueue
from worker.protocol.answer_pipes import TrainerPipes
from worker.protocol.mailbox import EventWriter, InboxReader, InboxWriter, Json, TrainerDirectory

LONGEST = tiny_base.MAX_POSITIONS * TOKEN_CHARS


@pytest.fixture
def directory(base_dir: Path, tmp_path: Path) -> TrainerDirectory:
    return TrainerDirectory.create(tmp_path / "trainer", trainer_settings(base_dir))


@pytest.fixture
def requests(base_dir: Path, directory: TrainerDirectory) -> Iterator[InferenceRequests]:
    events, text = EventWriter(directory), BaseText(base_dir)
    engine = Engine(load_base(base_dir, dtype="float32", device="cpu"), EngineConfig())
    yield InferenceRequests(engine, directory, events.write, text=lambda: text, free_host_bytes=lambda: 2**26)
    events.close()


def body(request_id: str = "req-1", **fields: Any) -> Any:
    """Return a greedy request of one token."""
    sampling = {"seed": 0, "temperature": 0.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    given = {"request_id": request_id, "model": "tiny", "adapter": None, "max_tokens": 1, "n": 1, "stop": []}
    return {**given, **sampling, "num_logprobs": None, **fields}


def turn(content: str) -> Json:
    return {"role": "user", "content": content}


def tool(description: str) -> Json:
    return {"type": "function", "function": {"name": "paint", "description": description, "parameters": {}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": ["a", "a" * (LONGEST + 1)]},
        {"messages": [turn("a" * LONGEST)]},
        {"messages": [turn("a")] * LONGEST},
        {"messages": [turn("a")], "tools": [tool("a" * LONGEST)]},
        {"messages": [turn("a")], "tools": [{"a" * LONGEST: 1}]},
    ],
    ids=["prompt", "message", "messages", "tool", "key"],
)
def test_prompt_that_can_not_fit_is_rejected_before_it_is_encoded(
    requests: InferenceRequests, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    encoded: list[Any] = []
    for name in ("prompt_ids", "chat_ids"):
        monkeypatch.setattr(BaseText, name, lambda *given, **_: encoded.append(given))

    requests.add(body(**fields))

    (event,) = events_in(directory)
    assert (event["type"], event["error"]["code"]) == ("unanswered", "context_length_exceeded")
    assert event["error"]["remedy"] == "Shorten the prompt."
    assert encoded == []


def test_prompt_of_long_tokens_is_not_rejected_by_its_characters(
    requests: InferenceRequests, directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseText, "longest_token", 2 * TOKEN_CHARS)
    monkeypatch.setattr(BaseText, "prompt_ids", lambda *_, **__: (5, 6))

    requests.add(body(prompts=["a" * 2 * LONGEST]))
    requests.add(body("too-long", prompts=["a" * (2 * LONGEST + 1)]))

    assert [event["type"] for event in events_in(directory)] == ["answering", "unanswered"]


def test_longest_token_is_that_of_the_vocabulary(base_dir: Path) -> None:
    assert BaseText(base_dir).longest_token == len("<|endoftext|>")


def test_training_gets_back_the_time_of_long_preparations() -> None:
    share, spent = TimeShare(), {"training": 0.0, "inference": 0.0}
    for _ in range(1000):
        if share.is_training_next():
            share.spent(training=0.03)
            spent["training"] += 0.03
        else:
            share.spent(inference=0.005, preparation=0.5)
            spent["inference"] += 0.505

    assert spent["training"] == pytest.approx(spent["inference"], rel=0.1)


class BusyEngine:
    """An engine with a job that trains."""

    idle = False
    ranks = ALONE
    base = SimpleNamespace(is_sharded=False)


class FakeInference:
    """Takes half a second to begin an answer, and then rejects the request."""

    is_idle = True

    def __init__(self, clock: Callable[[float], float]) -> None:
        self.begun: list[str] = []
        self._clock = clock

    def add(self, body: Json) -> None:
        self.begun.append(body["request_id"])
        self._clock(0.5)


def test_job_keeps_half_of_the_time_while_clients_send_long_prompts(
    directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, inbox, now, num_ticks = EventWriter(directory), WorkerEnd(directory), [0.0], [0]
    handlers = MessageHandlers(directory, cast(Engine, BusyEngine()), events)

    def clock(seconds: float = 0.0) -> float:
        now[0] += seconds
        return now[0]

    def tick() -> None:
        num_ticks[0] += 1
        clock(0.03)
        handlers.is_exiting = num_ticks[0] == 200

    fake = FakeInference(clock)
    monkeypatch.setattr(inference, "time", SimpleNamespace(monotonic=clock))
    for name, replacement in {"inference": fake, "tick": tick, "report": lambda: None}.items():
        monkeypatch.setattr(handlers, name, replacement)
    for number in range(40):
        inbox.send("answer", **body(f"req-{number}", prompts=["a" * ANSWER_CHARS]))

    main.train(handlers, busy_at=0.0, idle_seconds=None)

    events.close()
    assert now[0] == pytest.approx(2 * 200 * 0.03, rel=0.1)
    assert fake.begun == [f"req-{number}" for number in range(len(fake.begun))]


@pytest.fixture
def queue(directory: TrainerDirectory) -> MessageQueue:
    pipes = TrainerPipes(directory.requests_path, directory.tokens_path)
    return MessageQueue(InboxReader(directory), pipes, ALONE)


def taken(queue: MessageQueue, answer_chars: float) -> list[str]:
    taken = queue.take(answer_chars=answer_chars)
    return [f"{message.verb} {message.body.get('request_id', 'job')}" for message in taken]


def test_answers_wait_in_their_order_and_other_messages_do_not(
    queue: MessageQueue, directory: TrainerDirectory
) -> None:
    inbox = WorkerEnd(directory)
    for request_id in ("a", "b", "c"):
        inbox.send("answer", request_id=request_id)
    InboxWriter(directory).send("pause", claim_id="job")

    assert taken(queue, 0) == ["pause job"]
    assert taken(queue, 1) == ["answer a"]
    inbox.send("answer", request_id="d")
    inbox.send("stop_answering", request_id="b")
    inbox.send("stop_answering", request_id="a")
    assert taken(queue, 1) == ["answer c", "stop_answering b", "stop_answering a"]
    assert taken(queue, 1) == ["answer d"]
    assert taken(queue, 1) == []


@pytest.mark.parametrize(("num_jobs", "expected"), [(0, ["answer a", "answer b"]), (1, ["admit job", "answer a"])])
def test_all_answers_begin_at_once_only_while_no_job_trains(
    queue: MessageQueue, directory: TrainerDirectory, num_jobs: int, expected: list[str]
) -> None:
    inbox = WorkerEnd(directory)
    inbox.send("answer", request_id="a", prompts=["a" * ANSWER_CHARS])
    for _ in range(num_jobs):
        InboxWriter(directory).send("admit", claim_id="job")
    inbox.send("answer", request_id="b", prompts=["b"])

    assert taken(queue, math.inf) == expected


def test_answers_begin_until_their_prompts_have_the_characters(
    queue: MessageQueue, directory: TrainerDirectory
) -> None:
    inbox = WorkerEnd(directory)
    for request_id, prompts in {"a": ["abc", "d"], "b": ["abcdef"], "c": ["a"]}.items():
        inbox.send("answer", request_id=request_id, prompts=prompts)
    inbox.send("answer", request_id="d", messages=[turn("Hi")])

    assert taken(queue, 5) == ["answer a", "answer b"]
    assert taken(queue, 2) == ["answer c", "answer d"]


class Follower:
    """A rank that is not the leader. The leader sends one message."""

    leads = False

    def broadcast(self, value: Any) -> Any:
        assert value == []
        return [["answer", {"request_id": "a"}]]


def test_other_ranks_handle_the_messages_of_the_leader(directory: TrainerDirectory) -> None:
    WorkerEnd(directory).send("answer", request_id="never read")

    assert taken(MessageQueue(InboxReader(directory), None, cast(Ranks, Follower())), 0) == ["answer a"]
