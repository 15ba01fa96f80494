"""Requests survive a restart of the API server and other jobs. A lost worker interrupts the answers that it began."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import tiny_base
from tests.system.api_process import Service, api_process
from tests.worker_site import BASE, PEPPER, SHORT_LEASE, WAIT_SECONDS, WorkerSite, worker_site

OPTIONS: dict[str, Any] = {
    "model": BASE,
    "messages": [{"role": "user", "content": "What color is the lorry?"}],
    "temperature": 1.8,
    "seed": 4,
    "max_tokens": 180,
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WorkerSite]:
    with worker_site(tmp_path, LORRY_IDLE_SECONDS="60", **SHORT_LEASE) as site:
        yield site


@pytest.fixture
def service(site: WorkerSite) -> Iterator[Service]:
    with api_process(site.settings.data_dir, pepper=PEPPER) as service:
        yield service


def text_of(stream: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_answer_of_a_worker_that_ends_is_interrupted_and_another_worker_answers_again(
    site: WorkerSite, service: Service, how: signal.Signals
) -> None:
    with service.client() as client:
        first = site.start_worker()
        site.wait_for_worker()
        whole = client.chat.completions.create(**OPTIONS).choices[0].message.content
        stream = client.chat.completions.create(stream=True, **OPTIONS)
        begun = [next(iter(stream)) for _ in range(3)]

        first.send_signal(how)
        site.start_worker()

        with pytest.raises(openai.APIError) as raised:
            text_of(stream)
        assert raised.value.code == "answer_interrupted"
        assert text_of(begun)
        assert client.chat.completions.create(**OPTIONS).choices[0].message.content == whole
        assert first.wait(WAIT_SECONDS) == (0 if how is signal.SIGTERM else -signal.SIGKILL)


def test_api_server_that_stops_finishes_its_streams_and_its_successor_answers(site: WorkerSite) -> None:
    site.start_worker()
    site.wait_for_worker()
    with ExitStack() as stack:
        with api_process(site.settings.data_dir, pepper=PEPPER) as service:
            client = stack.enter_context(service.client())
            whole = client.chat.completions.create(**OPTIONS).choices[0].message.content
            stream = client.chat.completions.create(stream=True, **OPTIONS)
            begun = [next(iter(stream))]
        assert text_of(begun) + text_of(stream) == whole

    with api_process(site.settings.data_dir, pepper=PEPPER) as service, service.client() as client:
        assert client.chat.completions.create(**OPTIONS).choices[0].message.content == whole


def test_jobs_and_requests_for_different_base_models_alternate_on_one_worker(
    site: WorkerSite, service: Service
) -> None:
    site.start_worker()
    site.wait_for_worker()
    with service.client() as client:
        whole = client.chat.completions.create(**OPTIONS).choices[0].message.content
        job = site.submit(site.upload(20), max_steps=3, precision="bfloat16")
        found: list[str | None] = []

        def ask() -> None:
            while not site.job(job).finished_at:
                found.append(client.chat.completions.create(**OPTIONS).choices[0].message.content)

        asking = threading.Thread(target=ask)
        asking.start()
        site.wait_for_end(job)
        asking.join(WAIT_SECONDS)

        assert not asking.is_alive()
        assert site.job(job).state == "succeeded", site.log()
        assert set(found) <= {whole}


def test_requests_for_two_base_models_take_turns_on_one_worker_without_jobs(tmp_path: Path) -> None:
    """The first request for the other base model waits neither for the idle time nor for the end of others."""
    of_other: dict[str, Any] = OPTIONS | {"model": "other"}
    with worker_site(tmp_path, LORRY_IDLE_SECONDS="3600") as site:
        site.import_base(tiny_base.make(tmp_path / "other", seed=1), name="other")
        with api_process(site.settings.data_dir, pepper=PEPPER) as service, service.client() as client:
            site.start_worker()
            site.wait_for_worker()
            whole = client.chat.completions.create(**OPTIONS).choices[0].message.content
            other = client.chat.completions.create(**of_other).choices[0].message.content
            assert other != whole
            found: list[str | None] = []
            is_answered = threading.Event()

            def ask() -> None:
                with service.client() as second:
                    while not is_answered.is_set():
                        found.append(second.chat.completions.create(**OPTIONS).choices[0].message.content)

            asking = threading.Thread(target=ask)
            asking.start()
            site.wait_until(lambda: found)
            again = client.chat.completions.create(**of_other).choices[0].message.content
            is_answered.set()
            asking.join(WAIT_SECONDS)

            assert not asking.is_alive()
            assert again == other
            assert set(found) == {whole}
