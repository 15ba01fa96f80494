"""Servers started by tests end with the tests, and a missing server is explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from tests.services.programs import Missing, find_or_install
from tests.services.redis import redis_server

ROOT = Path(__file__).parents[2]
HOLD_A_SERVER = """
import sys
from tests.services.redis import redis_server
with redis_server() as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def test_redis_answers_and_stores_nothing_on_disk(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)

    configuration = client.config_get("*")

    assert configuration["appendonly"] == "no"
    assert configuration["save"] == ""


def test_server_ends_with_its_block() -> None:
    with redis_server() as url:
        pid = redis.Redis.from_url(url).info("server")["process_id"]

    assert not psutil.pid_exists(pid)


def test_server_ends_when_the_tests_are_killed(redis_url: str) -> None:
    tests = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None
    url = tests.stdout.readline().strip()
    server = psutil.Process(redis.Redis.from_url(url).info("server")["process_id"])

    os.kill(tests.pid, signal.SIGKILL)
    tests.communicate()

    server.wait(timeout=20)


def test_missing_program_reports_everything_that_was_tried() -> None:
    def refuses() -> None:
        raise Missing("the registry is closed")

    with pytest.raises(Missing, match=r"no Moon server on this machine \(the registry is closed\)"):
        find_or_install(lambda: None, name="Moon server", installs=[refuses])
