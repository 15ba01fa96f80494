"""The environment of the demo: variables of the shell, the demo's folder, and other demos in this folder."""

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
"""Download, base model and its import. 0.4 GB remain afterwards."""
_LATER_RUN_BYTES = 200_000_000
_LOOPBACK = ("127.0.0.1", "localhost")
_ELSEWHERE = f"or use another folder for the demo's files: {OWN}=/another/folder make demo"


def leave_settings_aside() -> None:
    """Remove Lorry's variables from the environment, so that the demo's own service does not use the address, key,
    database or store of another one.

    Also exclude loopback addresses from proxies, because the service runs on this machine.
    """
    others = sorted(name for name in os.environ if name.startswith("LORRY_") and name != OWN)
    for name in others:
        del os.environ[name]
    if others:
        console.print(f"The demo runs its own service and ignores these variables of your shell: {', '.join(others)}.")
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *_LOOPBACK)))


def folder() -> Path:
    """Return the demo's folder, created if missing. Raises DemoFailed if too little disk space is free."""
    given = os.environ.get(OWN)
    root = Path(given).expanduser() if given else Path(__file__).parents[2] / ".cache" / "demo"
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(root).free, _LATER_RUN_BYTES if _has_base(root) else _FIRST_RUN_BYTES
    if free < needed:
        raise DemoFailed(
            f"{root} has {free / 1e9:.1f} GB of free space, but the demo needs {needed / 1e9:.1f} GB. "
            f"Free space there, {_ELSEWHERE}"
        )
    return root


@contextmanager
def alone_in(root: Path) -> Generator[None]:
    """Lock the folder. Two demos in one folder would share a service, which the first one to finish would stop."""
    with (root / "demo.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DemoFailed(
                f"Another demo (process {lock.read().strip()}) is running in {root}. Wait until it ends, {_ELSEWHERE}"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def told(failure: OSError) -> str:
    """Return the message for a file that could not be written or read, with a remedy."""
    where = f"{failure.filename}: " if failure.filename else ""
    why = f"{where}{failure.strerror or failure}."
    if failure.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"{why} Free space on that disk, {_ELSEWHERE}"
    if failure.errno in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}:
        return f"{why} Make the folder writable, {_ELSEWHERE}"
    return why


def _has_base(root: Path) -> bool:
    return any((root / "data" / "bases").glob("*/model.safetensors"))
