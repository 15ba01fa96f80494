"""The pipes carry messages of any length in both directions, and no malformed line."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from worker.protocol import answer_pipes
from worker.protocol.answer_pipes import PIPE_BYTES, TrainerPipes, WorkerPipes
from worker.protocol.mailbox import Json, MalformedEvent, TrainerDirectory, TrainerMessage


@pytest.fixture
def directory(tmp_path: Path) -> TrainerDirectory:
    return TrainerDirectory.create(tmp_path / "trainer", {"device": "cpu"})


def opened(directory: TrainerDirectory) -> TrainerPipes:
    return TrainerPipes(directory.requests_path, directory.tokens_path)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run in a new thread: Playwright leaves a running event loop in the main thread of a process."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


def exchange(directory: TrainerDirectory, trainer: TrainerPipes, bodies: list[Json], num_events: int) -> list[object]:
    """Send messages, and return what the worker receives. The trainer sends back the length of each text."""
    received: list[object] = []

    def work() -> None:
        left = len(bodies)
        while left:
            messages = trainer.take()
            left -= len(messages)
            for message in messages:
                trainer.write({"type": "generated", "n": len(message.body["text"]), "text": message.body["text"]})

    async def main() -> None:
        done = asyncio.Event()

        def receive(event: Json) -> None:
            received.append(event["n"])
            if len(received) == num_events:
                done.set()

        def fail(error: MalformedEvent) -> None:
            received.append(error)
            done.set()

        paths = (directory.requests_path, directory.tokens_path)
        pipes = WorkerPipes(*paths, receive=receive, fail=fail)
        for body in bodies:
            pipes.send("answer", body)
        async with asyncio.timeout(60):
            await done.wait()
        pipes.close()

    thread = threading.Thread(target=work)
    thread.start()
    run(main())
    thread.join(60)
    return received


def test_messages_longer_than_a_pipe_arrive_whole_and_in_order(directory: TrainerDirectory) -> None:
    sizes = [3, 3 * PIPE_BYTES, 0, PIPE_BYTES]

    assert exchange(directory, opened(directory), [{"text": "x" * size} for size in sizes], len(sizes)) == sizes


def test_message_waits_for_a_trainer_that_opens_its_end_later(directory: TrainerDirectory) -> None:
    async def send() -> None:
        paths = (directory.requests_path, directory.tokens_path)
        pipes = WorkerPipes(*paths, receive=lambda _: None, fail=lambda _: None)
        pipes.send("answer", {"request_id": "a"})
        assert opened(directory).take() == [TrainerMessage(verb="answer", body={"request_id": "a"})]
        pipes.close()

    run(send())


def test_trainer_wakes_when_a_message_arrives(directory: TrainerDirectory) -> None:
    trainer, fd = opened(directory), os.open(directory.requests_path, os.O_RDWR)
    assert not trainer.wait(0)
    os.write(fd, b'{"verb": "answer", "body": {}}\n')
    assert trainer.wait(60)
    assert not trainer.take()[0].body
    os.close(fd)


@pytest.mark.parametrize("line", [b"no JSON\n", b'{"type": "generated"}\n', b"x" * 200])
def test_worker_reports_a_line_that_is_no_event(
    directory: TrainerDirectory, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(answer_pipes, "LONGEST_LINE_BYTES", 100)
    trainer = opened(directory)
    os.write(trainer._tokens, line)

    (error,) = exchange(directory, trainer, [], 1)

    assert isinstance(error, MalformedEvent)


def test_pipe_that_was_replaced_by_a_link_is_not_opened(directory: TrainerDirectory, tmp_path: Path) -> None:
    directory.requests_path.unlink()
    directory.requests_path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=r"requests\.pipe"):
        opened(directory)
