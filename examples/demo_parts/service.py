"""Step 3: `lorry up` in a folder of its own, and the base model added to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from demo_parts.base_source import Source
from demo_parts.report import DemoFailed, console
from lorry import Lorry, LorryError
from lorry.models import Model

_STOP_SECONDS = 90


@contextmanager
def running(data_dir: Path, log: Path, *, keep: bool) -> Generator[Lorry]:
    """A service on `data_dir`: the one that an earlier KEEP=1 left there, else a new one, ended unless `keep`."""
    data_dir.mkdir(exist_ok=True)
    left = _left_running(data_dir)
    if left is not None:
        console.print(f"A service that was kept runs at {left.url}")
        console.print(f"Dashboard, signing in once: {left.sign_in_links.create()['url']}")
        with left:
            yield left
        return
    process = _start(data_dir, log)
    done = False
    try:
        with Lorry(data_dir=data_dir) as lorry:
            yield lorry
        done = True
    finally:
        if not (keep and done):
            process.terminate()
            process.wait(_STOP_SECONDS)


def add_base(lorry: Lorry, name: str, source: Source) -> Model:
    """Imported once: on a data folder that has it, this is a look-up."""
    lorry.models.add(name, source.source, kind=source.kind, revision=source.revision)
    with console.status(f"Importing {name} (once)"):
        base = lorry.models.wait(name, timeout_seconds=600)
    console.print(f"Base {name} is ready, digest {(base.digest or '')[:16]}…")
    return base


def farewell(lorry: Lorry, data_dir: Path) -> None:
    """How to go on from here."""
    if os.environ.get("KEEP"):
        console.print(f"The service stays at {lorry.url}. Sign in, once, at")
        console.print(lorry.sign_in_links.create()["url"], soft_wrap=True)
        console.print("Use it:")
        console.print(f"  export LORRY_DATA_DIR={data_dir}", soft_wrap=True)
        console.print(f"  {Path(sys.executable).parent}/lorry jobs list", soft_wrap=True)
        console.print(f"Stop it:\n  kill $(cat {data_dir}/up.lock)", soft_wrap=True)
    else:
        console.print(f"Stopping the service. Its jobs and adapters stay in {data_dir};", soft_wrap=True)
        console.print("`make demo KEEP=1` leaves it running.")


def _left_running(data_dir: Path) -> Lorry | None:
    """A client of the service that answers for this folder now."""
    try:
        lorry = Lorry(data_dir=data_dir)
        lorry.queue.get()
    except LorryError:
        return None
    return lorry


def _start(data_dir: Path, log: Path) -> subprocess.Popen[str]:
    """Returns when it is ready: it says so in one line of JSON."""
    argv = [sys.executable, "-P", "-m", "lorry", "up", "--json", "--data-dir", str(data_dir)]
    with log.open("ab") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        with console.status("Starting"):
            line = process.stdout.readline() if process.stdout else ""
    except BaseException:
        process.terminate()
        raise
    if not line:
        process.wait(_STOP_SECONDS)
        raise DemoFailed(
            f"`lorry up` did not start:\n{''.join(log.read_text('utf-8').splitlines(keepends=True)[-20:])}"
        )
    ready = json.loads(line)
    console.print(f"Lorry runs at {ready['url']}")
    console.print(f"Dashboard, signing in once: {ready['sign_in_url']}")
    return process
