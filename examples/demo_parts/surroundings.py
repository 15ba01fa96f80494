"""The demo's environment: the caller's variables, the demo's folder and its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from demo_parts.report import DemoFailed, console

OWN = "LORRY_DEMO_DIR"
_FIRST_RUN_BYTES = 1_000_000_000
"""The download, the base model and its import. 0.4 GB remain."""
_LATER_RUN_BYTES = 200_000_000
_LOOPBACK = ("127.0.0.1", "localhost")
_ELSEWHERE = f"or use another folder: {OWN}=/another/folder make demo"


def remove_lorry_settings() -> list[str]:
    """Remove LORRY_ variables from the environment, so that the demo uses its own service, database and store.

    Requests to this machine bypass any proxy. Returns the names of the removed variables.
    """
    others = sorted(name for name in os.environ if name.startswith("LORRY_") and name != OWN)
    for name in others:
        del os.environ[name]
    if others:
        console.print(
            f"The demo starts its own service and ignores these variables of your shell: {', '.join(others)}."
        )
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *_LOOPBACK)))
    return others


def folder() -> Path:
    """Create the demo's folder if it is missing. Raises DemoFailed if its disk has too little free space."""
    given = os.environ.get(OWN)
    root = Path(given).expanduser() if given else Path(__file__).parents[2] / ".cache" / "demo"
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(root).free, _LATER_RUN_BYTES if _has_base(root) else _FIRST_RUN_BYTES
    if free < needed:
        raise DemoFailed(
            f"The disk of {root} has {free / 1e9:.1f} GB free; the demo needs {needed / 1e9:.1f} GB. "
            f"Free some space, {_ELSEWHERE}"
        )
    return root


@contextmanager
def locked(root: Path) -> Generator[None]:
    """Hold the folder's lock. Two demos in one folder would share a service, which the first to finish stops."""
    with (root / "demo.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DemoFailed(
                f"Another demo (process {lock.read().strip()}) uses {root}. Wait until it has finished, {_ELSEWHERE}"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def explained(failure: OSError) -> str:
    """Return a sentence with a fix for a file that can't be created or read."""
    where = f"{failure.filename}: " if failure.filename else ""
    why = f"{where}{failure.strerror or failure}."
    if failure.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"{why} Free some space on that disk, {_ELSEWHERE}"
    if failure.errno in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}:
        return f"{why} Make the folder writable, {_ELSEWHERE}"
    return why


def _has_base(root: Path) -> bool:
    return any((root / "data" / "bases").glob("*/model.safetensors"))
