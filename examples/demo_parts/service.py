"""Step 3: runs `lorry up` in a separate folder, and adds the base model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo_parts.base_source import Source
from demo_parts.report import DemoFailed, console, waiting
from lorry import Lorry, LorryError, RetryPolicy
from lorry.models.jobs import Model

_STOP_SECONDS = 90
_TOLD_LINES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A client of the service, and whether the service keeps running after the demo."""

    lorry: Lorry
    stays: bool


@contextmanager
def running(data_dir: Path, log: Path, *, keep: bool) -> Generator[Running]:
    """Yield a service on `data_dir`: one that is already running there, which is kept, or a new one, which is stopped
    unless `keep`."""
    data_dir.mkdir(exist_ok=True)
    left = _left_running(data_dir)
    if left is not None:
        console.print(f"Using the service that is already running at {left.url}")
        with left:
            console.print(f"Dashboard (one-time link): {left.sign_in_links.create()['url']}", soft_wrap=True)
            yield Running(lorry=left, stays=True)
        return
    process = _start(data_dir, log)
    done = False
    try:
        with Lorry(data_dir=data_dir) as lorry:
            yield Running(lorry=lorry, stays=keep)
        done = True
    finally:
        if not (keep and done):
            with waiting("Stopping the service"):
                _stop(process)


def add_base(lorry: Lorry, name: str, source: Source) -> Model:
    """Import the base model, unless the data folder already has it."""
    lorry.models.add(name, source.source, kind=source.kind, revision=source.revision)
    with waiting(f"Importing {name} (once)"):
        base = lorry.models.wait(name, timeout_seconds=600)
    console.print(f"Base {name} is ready, digest {(base.digest or '')[:16]}…")
    return base


def farewell(running: Running, data_dir: Path) -> None:
    """Print the next steps."""
    if not running.stays:
        console.print(f"Stopping the service. Its jobs and adapters are kept in {data_dir};", soft_wrap=True)
        console.print("`make demo KEEP=1` leaves it running.")
        return
    lines = (
        f"The service keeps running at {running.lorry.url}. Sign in to its dashboard with this one-time link:",
        f"  {running.lorry.sign_in_links.create()['url']}",
        "Use it:",
        "  unset LORRY_URL LORRY_API_KEY",
        f"  export LORRY_DATA_DIR={shlex.quote(str(data_dir))}",
        f"  {shlex.quote(str(Path(sys.executable).parent / 'lorry'))} jobs list",
        "Stop it:",
        f"  kill $(cat {shlex.quote(str(data_dir / 'up.lock'))})",
    )
    for line in lines:
        console.print(line, soft_wrap=True)


def _left_running(data_dir: Path) -> Lorry | None:
    """Return a client of the service that is running on this folder; None if there is none."""
    try:
        with Lorry(data_dir=data_dir, retries=RetryPolicy(max_retries=0)) as probing:
            probing.queue.get()
        return Lorry(data_dir=data_dir)
    except LorryError:
        return None


def _start(data_dir: Path, log: Path) -> subprocess.Popen[str]:
    """Start `lorry up` and return when it is ready, which it reports in one line of JSON. The process has its own
    session, so that only the demo handles Ctrl-C."""
    argv = [sys.executable, "-P", "-m", "lorry", "up", "--json", "--data-dir", str(data_dir)]
    with log.open("ab") as errors:
        begins = errors.seek(0, os.SEEK_END)
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        with waiting("Starting"):
            line = process.stdout.readline() if process.stdout else ""
    except BaseException:
        _stop(process)
        raise
    if not line:
        _stop(process)
        complaint = "\n".join(log.read_bytes()[begins:].decode("utf-8", "replace").splitlines()[-_TOLD_LINES:])
        raise DemoFailed(f"The service did not start. Last output of `lorry up` (full log: {log}):\n{complaint}")
    ready = json.loads(line)
    console.print(f"Lorry is running at {ready['url']}")
    console.print(f"Dashboard (one-time link): {ready['sign_in_url']}", soft_wrap=True)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop the service. Jobs save checkpoints first; a second Ctrl-C or a timeout kills it."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.terminate()  # second signal: `lorry up` kills its child processes
        process.wait()
