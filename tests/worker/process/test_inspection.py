"""A process that holds secrets is closed to other processes of its user, and still reads itself and its children."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import api.server
from catalog.settings import Settings
from worker.entrypoints import celery_app, loop, node_supervisor

ROOT = Path(__file__).parents[3]
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
READS = """
import ctypes, json, os, sys
from pathlib import Path
import psutil
from catalog.process_inspection import deny_inspection
from worker.node import cgroup
from worker.process import exit_status
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # a change of the user has closed it already
def readable_by_another():
    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        try:
            Path(f"/proc/{os.getppid()}/environ").read_bytes()
        except PermissionError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
before = readable_by_another()
deny_inspection()
after = readable_by_another()
own = psutil.Process()
child = os.fork()
if child == 0:
    import signal
    signal.pause()
told = {
    "before": before,
    "after": after,
    "own memory": own.memory_info().rss > 0,
    "own time": own.cpu_times().user >= 0,
    "children": [one.pid for one in own.children(recursive=True)] == [child],
    "memory of a child": psutil.Process(child).memory_info().rss > 0,
    "signals of a child": exit_status._handles_signal(child) in (True, False),
    "oom kills": cgroup.oom_kills() is not None,
    "own files": len(os.listdir("/proc/self/fd")) > 0,
}
os.kill(child, 9)
print(json.dumps(told))
"""


@NEEDS_LINUX
def test_another_process_of_the_user_can_not_read_it_and_what_the_worker_reads_of_processes_stays_readable() -> None:
    ended = subprocess.run([sys.executable, "-c", READS], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told.pop("before"), told.pop("after")) == (True, False)
    assert all(told.values()), told


class Closed(Exception):
    """In the place of what a program does afterwards."""


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        (loop, lambda: loop.main(["--device", "cpu"])),
        (node_supervisor, lambda: node_supervisor.main(["--groups", "cpu"])),
        (celery_app, celery_app._refuse_unfit),
        (api.server, lambda: api.server.serve(Settings(), host="127.0.0.1", port=0)),
    ],
    ids=["worker", "workers of a machine", "Celery's worker", "API server"],
)
def test_every_process_with_secrets_closes_itself_before_all_else(
    monkeypatch: pytest.MonkeyPatch, module: object, begin: Callable[[], object]
) -> None:
    def close() -> None:
        raise Closed

    monkeypatch.setattr(module, "deny_inspection", close)

    with pytest.raises(Closed):
        begin()


@NEEDS_LINUX
def test_a_program_that_it_starts_is_readable_again() -> None:
    code = "import subprocess, sys; from catalog.process_inspection import deny_inspection; deny_inspection()\n" + (
        "subprocess.run([sys.executable, '-c', 'import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))'])"
    )

    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert told == "1\n"
