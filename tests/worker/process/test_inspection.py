"""A process that holds secrets is unreadable to other processes of its user. It can read itself and its children."""

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
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this protection")
READS = """
import ctypes, json, os, sys
from pathlib import Path
import psutil
from catalog.processes import deny_inspection
from worker.node import cgroup
from worker.process import exit_status
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # the change of the user has made it unreadable
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
result = {
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
print(json.dumps(result))
"""


@NEEDS_LINUX
def test_inspection_is_denied_to_other_processes_and_not_to_the_worker() -> None:
    ended = subprocess.run([sys.executable, "-c", READS], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result.pop("before"), result.pop("after")) == (True, False)
    assert all(result.values()), result


class Closed(Exception):
    """Replaces the rest of the program."""


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        (loop, lambda: loop.main(["--device", "cpu"])),
        (node_supervisor, lambda: node_supervisor.main(["--groups", "cpu"])),
        (celery_app, celery_app._refuse_unfit),
        (api.server, lambda: api.server.serve(Settings(), host="127.0.0.1", port=0)),
    ],
    ids=["worker", "node supervisor", "Celery's worker", "API server"],
)
def test_every_process_with_secrets_denies_inspection_first(
    monkeypatch: pytest.MonkeyPatch, module: object, begin: Callable[[], object]
) -> None:
    def close() -> None:
        raise Closed

    monkeypatch.setattr(module, "deny_inspection", close)

    with pytest.raises(Closed):
        begin()


@NEEDS_LINUX
def test_a_started_program_is_readable_again() -> None:
    code = "import subprocess, sys; from catalog.processes import deny_inspection; deny_inspection()\n" + (
        "subprocess.run([sys.executable, '-c', 'import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))'])"
    )

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert result == "1\n"
