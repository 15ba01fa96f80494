"""A child process that never exits on its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

SLEEPER = [sys.executable, "-c", "import threading; threading.Event().wait()"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(SLEEPER, start_new_session=True)
    yield child
    child.kill()
    child.wait()
