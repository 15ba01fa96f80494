"""Converts a path that a trainer reports to a path that the worker uses. No other code does this.

A trainer is not trusted: it may name any path, and may replace a folder by a link after the check. Therefore a name is
resolved one component at a time from an open folder, no link is followed, and opened files are used by their
descriptors.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from catalog.errors import LorryError

MAX_NAME_CHARS = 1024
MAX_COMPONENT_BYTES = 255
"""Limit of the file systems of Linux and macOS."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
OF_TRAINER = (errno.ELOOP, errno.ENOTDIR, errno.EACCES)
"""Errors that a trainer causes by replacing a folder with something else. The node causes all other errors."""
NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafePath(LorryError):
    """A trainer reported a path that does not lead to one of its own files or folders."""

    def __init__(self, name: object, reason: str, *, writer: str = "The trainer") -> None:
        """reason: a predicate about the path."""
        super().__init__("unsafe_path", writer=writer, name=str(name)[:200], reason=reason)
        self.path_name, self.reason = name, reason

    def by(self, writer: str) -> UnsafePath:
        """Return this error with the name of the trainer."""
        return UnsafePath(self.path_name, self.reason, writer=writer)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderEntry:
    """A name in an open folder, as `open`, `rmtree` and `fwalk` accept it (name and `dir_fd`)."""

    name: str
    dir_fd: int


def confined(root: Path, name: object) -> Path:
    """Return the path of `name`, which is relative to `root`.

    Raises UnsafePath if `name` is absolute, has a component `..`, is `root` itself, or leads through a link. The file
    need not exist. To use it, call `opened` or `delete`.
    """
    with suppress(FileNotFoundError), opened(root, name):
        pass
    return root.joinpath(*_parts(name))


@contextmanager
def opened(root: Path, name: object) -> Generator[FolderEntry]:
    """Yield the last component of `name` in its parent folder, which stays open for the length of the block. The
    component may become a link meanwhile, so the caller must open it without following links.

    Raises UnsafePath like `confined`, FileNotFoundError, and OSError for an error of the node.
    """
    *parents, last = _parts(name)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            try:
                inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=descriptor)
            except OSError as error:
                if error.errno not in OF_TRAINER:
                    raise
                raise UnsafePath(name, "leads through a link, a file or an unreadable folder") from error
            os.close(descriptor)
            descriptor = inner
        if stat.S_ISLNK(os.stat(last, dir_fd=descriptor, follow_symlinks=False).st_mode):
            raise UnsafePath(name, "is a link")
        yield FolderEntry(name=last, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def delete(root: Path, name: object) -> None:
    """Delete the folder `name` with its content. Does nothing if it is missing. Raises UnsafePath."""
    with suppress(FileNotFoundError), opened(root, name) as entry:
        mode = os.stat(entry.name, dir_fd=entry.dir_fd, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            raise UnsafePath(name, "is not a folder")
        shutil.rmtree(entry.name, ignore_errors=True, dir_fd=entry.dir_fd)


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a plain file that a trainer's process writes, such as its log, in a folder of the worker.

    Follows no link, and does not wait for a pipe. Raises OSError: ELOOP for a link, EPERM if it is not a plain file
    with a single name.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | NO_LINK, 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "It is not a plain file with a single name", str(path))
    return descriptor


def _parts(name: object) -> tuple[str, ...]:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or "\0" in name or SURROGATE.search(name):
        raise UnsafePath(name, f"is not a valid path of 1 to {MAX_NAME_CHARS:,} characters")
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or not all(parts) or {".", ".."} & set(parts):
        raise UnsafePath(name, "is absolute, or has an empty component, '.' or '..'")
    if any(len(os.fsencode(part)) > MAX_COMPONENT_BYTES for part in parts):
        raise UnsafePath(name, f"has a component that is longer than {MAX_COMPONENT_BYTES} bytes")
    return tuple(parts)
