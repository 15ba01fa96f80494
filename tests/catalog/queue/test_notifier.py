"""The notifier of workers with a Redis server, without one, and with one that starts late."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from catalog.queue import notifier as notifier_module
from catalog.queue.notifier import QUEUE, TASK, TRANSPORT_OPTIONS, FileNotifier, RedisNotifier, open_notifier
from catalog.settings import Settings
from tests.services.redis import redis_server
from tests.services.running import closed_port, free_port

KEY = f"{TRANSPORT_OPTIONS['global_keyprefix']}{QUEUE}"


def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a broker, `close` sends the last notification however slow the machine is."""
    if "broker" in request.fixturenames:
        monkeypatch.setattr(notifier_module, "CLOSE_SECONDS", 60.0)


@pytest.fixture
def broker(redis_url: str) -> Any:
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    yield client
    client.close()


def test_notification_is_one_message_without_content(redis_url: str, broker: Any) -> None:
    notifier = RedisNotifier(redis_url)

    notifier.wake_workers()

    until(lambda: broker.llen(KEY) == 1)
    message = json.loads(broker.lindex(KEY, 0))
    assert message["headers"]["task"] == TASK
    assert (message["headers"]["argsrepr"], message["headers"]["kwargsrepr"]) == ("()", "{}")
    notifier.close()


def test_concurrent_notifications_are_coalesced(redis_url: str, broker: Any) -> None:
    notifier = RedisNotifier(redis_url)

    for _ in range(100):
        notifier.wake_workers()
    notifier.close()

    assert 1 <= broker.llen(KEY) < 100


def test_concurrent_notifications_start_one_relay_thread(redis_url: str, broker: Any) -> None:
    notifier = RedisNotifier(redis_url)
    notifying_threads = [threading.Thread(target=notifier.wake_workers) for _ in range(20)]

    for notifying_thread in notifying_threads:
        notifying_thread.start()
    for notifying_thread in notifying_threads:
        notifying_thread.join()

    relays = [thread for thread in threading.enumerate() if thread.name == "lorry-notifier" and thread.daemon]
    notifier.close()
    assert len(relays) == 1
    assert broker.llen(KEY) >= 1


def test_last_notification_is_sent_before_close_returns(redis_url: str, broker: Any) -> None:
    notifier = RedisNotifier(redis_url)

    notifier.wake_workers()
    notifier.close()

    assert broker.llen(KEY) == 1
    notifier.wake_workers()
    assert broker.llen(KEY) == 1


class Silence:
    """A port that accepts connections and never answers, the worst case of a broker."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}/0"


@pytest.mark.parametrize("kind", ["refused", "silent", "unknown host", "no address"])
def test_unreachable_broker_neither_blocks_nor_fails_a_notification(kind: str) -> None:
    silence = Silence()
    with closed_port() as port:
        urls = {
            "refused": f"redis://127.0.0.1:{port}/0",
            "silent": silence.url,
            "unknown host": "redis://no.such.host.invalid:6379/0",
            "no address": "not a url",
        }
        notifier = RedisNotifier(urls[kind], first_wait_seconds=0.05)
        notifying_thread = threading.Thread(target=lambda: [notifier.wake_workers() for _ in range(1_000)], daemon=True)

        notifying_thread.start()
        notifying_thread.join(10)

        assert not notifying_thread.is_alive()
        notifier.close()
    silence.listener.close()


def test_notification_is_delivered_once_the_broker_is_back() -> None:
    port = free_port()
    notifier = RedisNotifier(f"redis://127.0.0.1:{port}/0", first_wait_seconds=0.05)
    notifier.wake_workers()

    with redis_server(port) as url, redis.Redis.from_url(url) as broker:
        until(lambda: broker.llen(KEY) == 1)
        notifier.close()


def test_file_notifier_notifies_each_waiting_process_once(tmp_path: Path) -> None:
    settings = Settings.model_validate({"redis_url": None, "data_dir": tmp_path})
    notifier, waiting = open_notifier(settings), FileNotifier(settings.notification_path())

    before = waiting.was_notified()
    notifier.wake_workers()
    came_later = FileNotifier(settings.notification_path())

    assert isinstance(notifier, FileNotifier)
    assert (before, waiting.was_notified(), waiting.was_notified()) == (False, True, False)
    assert not came_later.was_notified()
    notifier.close()
    assert isinstance(open_notifier(Settings.model_validate({"redis_url": "redis://localhost"})), RedisNotifier)


def test_unwritable_file_notifier_raises_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notifier = FileNotifier(tmp_path / "file" / "notified")

    notifier.wake_workers()

    assert not notifier.was_notified()


def test_process_that_never_notifies_does_not_load_celery() -> None:
    program = "import sys; from catalog.queue.notifier import RedisNotifier; RedisNotifier('redis://x').close(); "
    program += "print('celery' in sys.modules)"

    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert ran.stdout == "False\n"


def test_worker_consumes_the_queue_of_the_notifier() -> None:
    program = (
        "from worker.entrypoints.celery_app import app; import worker.entrypoints.celery_app, json; c = app.conf; "
    )
    program += "print(json.dumps([c.task_default_queue, c.broker_transport_options, sorted(app.tasks)]))"

    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    queue, options, tasks = json.loads(ran.stdout)
    assert (queue, options["global_keyprefix"]) == (QUEUE, TRANSPORT_OPTIONS["global_keyprefix"])
    assert TASK in tasks


def test_unread_notifications_stay_bounded(redis_url: str, broker: Any) -> None:
    """All workers train while several API servers send notifications for days."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(notifier_module, "MAX_QUEUED", 3)
        for _ in range(8):
            notifier = RedisNotifier(redis_url)
            notifier.wake_workers()
            notifier.close()

    assert broker.llen(KEY) == 3


def test_notification_is_sent_again_after_waiting_messages_were_read(redis_url: str, broker: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(notifier_module, "MAX_QUEUED", 1)
        notifier = RedisNotifier(redis_url)
        notifier.wake_workers()
        until(lambda: broker.llen(KEY) == 1)
        broker.delete(KEY)

        notifier.wake_workers()

        until(lambda: broker.llen(KEY) == 1)
        notifier.close()
