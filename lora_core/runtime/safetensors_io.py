# pyright: strict
"""Safetensors headers with size limits, and atomic creation of directories.

A header lists every tensor. Parsing a hostile one can take a gigabyte of memory, so its size is checked first.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from lora_core.errors import UnsafeFile

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpan:
    """A tensor of a safetensors file. Its data are the bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return (dtype, shape) of each tensor in a safetensors file by name. Raises UnsafeFile."""
    return {name: (span.dtype, span.shape) for name, span in tensor_spans(path).items()}


def tensor_spans(path: Path) -> dict[str, TensorSpan]:
    """Return the position of each tensor in a safetensors file by name. Raises UnsafeFile."""
    try:
        header, header_bytes = _parse_header(path)
        return {name: _span(entry, header_bytes) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UnsafeFile):
            raise
        raise _unsafe(path, f"can't be read as safetensors ({type(error).__name__})") from error


def _span(entry: dict[str, Any], header_bytes: int) -> TensorSpan:
    start, stop = (8 + header_bytes + int(offset) for offset in entry["data_offsets"])
    return TensorSpan(dtype=str(entry["dtype"]), shape=tuple(entry["shape"]), start=start, stop=stop)


def _parse_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries by name, and the length of the header in bytes without its 8-byte length field."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise _unsafe(path, f"has a header of {num_bytes:,} bytes, but the maximum is {MAX_HEADER_BYTES:,}")
        header = cast(dict[str, dict[str, Any]], json.loads(file.read(num_bytes)))
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _unsafe(path, f"contains {len(header):,} tensors, but the maximum is {MAX_TENSORS:,}")
    return header, num_bytes


def _unsafe(path: Path, reason: str) -> UnsafeFile:
    return UnsafeFile(
        f"{path.name} {reason}.", remedy="Save the file again with a current version of the safetensors library."
    )


def write_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Create `directory` atomically: `fill` writes to a temporary sibling, which is fsynced and renamed.

    Raises FileExistsError if `directory` exists, and OSError if writing fails. Then nothing remains on the disk.
    """
    if directory.exists():
        raise FileExistsError(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _disk_errors_named():
            fill(temporary)
        readable = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        for path in [*sorted(temporary.rglob("*")), temporary]:
            if path.is_file():
                path.chmod(readable)  # safetensors creates files that only their owner can read
            _fsync(path)
        temporary.rename(directory)
        _fsync(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _disk_errors_named() -> Generator[None]:
    """Convert safetensors' own error for a failed write to OSError. It only has the errno in its text."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal. The file is read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
