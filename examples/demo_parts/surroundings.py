"""What the demo finds around it: the caller's environment, the folder it keeps things in, another demo in there."""

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
"""Download, base model and its import. What stays is 0.4 GB."""
_LATER_RUN_BYTES = 200_000_000
_LOOPBACK = ("127.0.0.1", "localhost")
_ELSEWHERE = f"or keep the demo's files elsewhere: {OWN}=/another/folder make demo"


def leave_settings_aside() -> None:
    """The demo's service is its own: another one's address, key, database or store in the shell must not reach it.

    Nor may a proxy come between the client and a service on this machine.
    """
    others = sorted(name for name in os.environ if name.startswith("LORRY_") and name != OWN)
    for name in others:
        del os.environ[name]
    if others:
        console.print(f"The demo has a service of its own, and leaves aside what your shell sets: {', '.join(others)}.")
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *_LOOPBACK)))


def folder() -> Path:
    """Made if need be. Raises DemoFailed where it has too little room."""
    given = os.environ.get(OWN)
    root = Path(given).expanduser() if given else Path(__file__).parents[2] / ".cache" / "demo"
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(root).free, _LATER_RUN_BYTES if _has_base(root) else _FIRST_RUN_BYTES
    if free < needed:
        raise DemoFailed(
            f"{root} has {free / 1e9:.1f} GB free, and the demo needs {needed / 1e9:.1f} GB. "
            f"Make room there, {_ELSEWHERE}"
        )
    return root


@contextmanager
def alone_in(root: Path) -> Generator[None]:
    """Two demos in one folder would share a service that the first to finish stops."""
    with (root / "demo.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DemoFailed(
                f"Another demo (process {lock.read().strip()}) is at work in {root}. Wait for its end, {_ELSEWHERE}"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def told(failure: OSError) -> str:
    """The sentence for a file that could not be made or read, with a remedy."""
    where = f"{failure.filename}: " if failure.filename else ""
    why = f"{where}{failure.strerror or failure}."
    if failure.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"{why} Make room on that disk, {_ELSEWHERE}"
    if failure.errno in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}:
        return f"{why} Make it a folder that can be written, {_ELSEWHERE}"
    return why


def _has_base(root: Path) -> bool:
    return any((root / "data" / "bases").glob("*/model.safetensors"))
