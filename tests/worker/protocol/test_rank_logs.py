"""Each process of a trainer prints into its own file. A gang has a valid address."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from socket import AF_INET, AF_INET6
from types import SimpleNamespace

import pytest

from tests.worker_site import ROOT, WAIT_SECONDS, wait_until
from worker.protocol import errors
from worker.protocol.rendezvous import place_of

BEGUN = "from worker.protocol import errors; import os, sys, time; errors.begin_rank_log(sys.argv[1]);"


def run(code: str, directory: Path, rank: int) -> subprocess.Popen[str]:
    """Start a process as a launcher does, with its output captured."""
    return subprocess.Popen(
        [sys.executable, "-c", BEGUN + code, str(directory)],
        cwd=ROOT,
        env=os.environ | {"RANK": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_prints_to_its_launcher(tmp_path: Path, rank: int) -> None:
    code = "print('by print'); sys.stderr.write('by stderr\\n'); sys.stderr.flush(); os.system('echo by a child')"
    printed = run(f"{code}; sys.stdout.flush()", tmp_path, rank).communicate(timeout=WAIT_SECONDS)[0]

    path = errors.rank_log(tmp_path, 1)
    kept = path.read_text() if path.exists() else ""
    used, unused = (kept, printed) if rank else (printed, kept)
    assert sorted(used.splitlines()) == ["by a child", "by print", "by stderr"]
    assert unused == ""


def test_a_process_dumps_its_stacks_on_request_and_continues(tmp_path: Path) -> None:
    loop = "while not os.path.exists(sys.argv[1] + '/go'): time.sleep(0.01)"
    code = f"\ndef stand():\n  print('here', flush=True)\n  {loop}\n"
    child = run(f"{code}\nstand(); sys.exit(7)", tmp_path, 3)
    path = errors.rank_log(tmp_path, 3)
    wait_until(lambda: path.exists() and "here" in path.read_text(), message=str)

    child.send_signal(errors.ASKED_BY)

    wait_until(lambda: "in stand" in path.read_text(), message=path.read_text)
    (tmp_path / "go").touch()

    child.communicate(timeout=WAIT_SECONDS)
    assert child.returncode == 7


def test_a_crash_by_a_signal_prints_the_stack(tmp_path: Path) -> None:
    code = "\ndef fall():\n  os.kill(os.getpid(), 11)\nfall()"

    printed = run(code, tmp_path, 0).communicate(timeout=WAIT_SECONDS)[0]

    assert "Segmentation fault" in printed
    assert "in fall" in printed


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.0.0.12", "would listen on 10.0.0.11, the first address of eth0"),
        ("fd00::2", "must be an IPv4 address"),
        ("node-a", "must be an IPv4 address"),
        ("10.0.0.13", "no network interface of this node has that address"),
    ],
)
def test_an_address_at_which_a_trainer_would_not_listen_is_rejected(address: str, why: str) -> None:
    found = ((AF_INET, "10.0.0.11"), (AF_INET, "10.0.0.12"), (AF_INET6, "fd00::2"))
    interfaces = {"eth0": [SimpleNamespace(family=family, address=text) for family, text in found]}

    assert place_of("10.0.0.11", interfaces) == ("10.0.0.11", "eth0")
    with pytest.raises(SystemExit, match=why):
        place_of(address, interfaces)
