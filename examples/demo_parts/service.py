"""Step 3: starts `lorry up` in the demo's own folder, and imports the base model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo_parts.base_source import Source
from demo_parts.report import DemoFailed, console, waiting
from lorry import Lorry, LorryError, RetryPolicy
from lorry.models import Model

_STOP_SECONDS = 90
_SHOWN_LINES = 12
_LINK = "Dashboard (this link signs in once, within 15 minutes)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A client of the service, which has its data in `data_dir`. `stays`: it keeps running after the demo."""

    lorry: Lorry
    data_dir: Path
    stays: bool


def command(data_dir: Path, removed: Sequence[str]) -> str:
    """Return the command `lorry` for another terminal: without the removed variables, on the data of the demo."""
    unset = " ".join(f"-u {name}" for name in sorted({"LORRY_URL", "LORRY_API_KEY", *removed} - {"LORRY_DATA_DIR"}))
    program = Path(sys.executable).parent / "lorry"
    return f"env {unset} LORRY_DATA_DIR={shlex.quote(str(data_dir))} {shlex.quote(str(program))}"


@contextmanager
def running(data_dir: Path, log: Path, command: str, *, keep: bool) -> Generator[Running]:
    """Use the service that runs on `data_dir`, or start one, which stops at the end unless `keep`."""
    data_dir.mkdir(exist_ok=True)
    left = _left_running(data_dir)
    if left is not None:
        console.print(f"The service of an earlier run is still running at {left.url}")
        with left:
            console.print(f"{_LINK}: {left.sign_in_links.create()['url']}", soft_wrap=True)
            yield Running(lorry=left, data_dir=data_dir, stays=True)
        return
    process = _start(data_dir, log, command)
    done = False
    try:
        with Lorry(data_dir=data_dir) as lorry:
            yield Running(lorry=lorry, data_dir=data_dir, stays=keep)
        done = True
    finally:
        if not (keep and done):
            with waiting("Stopping the service"):
                _stop(process)


def add_base(lorry: Lorry, name: str, source: Source) -> Model:
    """Import the base model, unless the data folder has it."""
    lorry.models.add(name, source.source, kind=source.kind, revision=source.revision)
    with waiting(f"Importing {name} (once)"):
        base = lorry.models.wait(name, timeout_seconds=600)
    console.print(f"Base {name} is ready, digest {(base.digest or '')[:16]}…")
    return base


def farewell(running: Running, command: str, adapter: str, question: str) -> None:
    """Print commands that ask the adapter the question and stop the service."""
    chat = f"  {command} chat {shlex.quote(adapter)} {shlex.quote(question)} --temperature 0"
    if running.stays:
        lines = (
            f"The service keeps running at {running.lorry.url}. {_LINK}: {running.lorry.sign_in_links.create()['url']}",
            "Ask the best adapter a question, and stop the service:",
            chat,
        )
    else:
        lines = (
            f"The service stops now. Its jobs and adapters are kept in {running.data_dir}.",
            "`make demo KEEP=1` leaves the service running after the demo.",
            "Start it again, ask the best adapter a question, and stop the service:",
            f"  {command} up --detach",
            chat,
        )
    for line in (*lines, f"  {command} down"):
        console.print(line, soft_wrap=True)


def _left_running(data_dir: Path) -> Lorry | None:
    """Return a client of the service that runs on this folder, or None."""
    try:
        with Lorry(data_dir=data_dir, retries=RetryPolicy(max_retries=0)) as probing:
            probing.queue.get()
        return Lorry(data_dir=data_dir)
    except LorryError:
        return None


def _start(data_dir: Path, log: Path, command: str) -> subprocess.Popen[str]:
    """Return when the service is ready. Its own session keeps Ctrl-C from reaching it."""
    argv = [sys.executable, "-P", "-m", "lorry", "up", "--json", "--data-dir", str(data_dir)]
    with log.open("ab") as errors:
        begins = errors.seek(0, os.SEEK_END)
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        with waiting("Starting the service"):
            line = process.stdout.readline() if process.stdout else ""
    except BaseException:
        _stop(process)
        raise
    if not line:
        _stop(process)
        complaint = "\n".join(log.read_bytes()[begins:].decode("utf-8", "replace").splitlines()[-_SHOWN_LINES:])
        raise DemoFailed(f"The service did not start. The last lines of {log}:\n{complaint}")
    ready = json.loads(line)
    console.print(f"Lorry runs at {ready['url']}")
    console.print(f"{_LINK}: {ready['sign_in_url']}", soft_wrap=True)
    console.print(f"While the demo runs: {command} jobs list", soft_wrap=True)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    """Let jobs save a checkpoint first. A second Ctrl-C, or the timeout, kills the service."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.terminate()  # a second signal makes `lorry up` kill its processes
        process.wait()
