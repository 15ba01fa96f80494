"""A tar archive of an adapter: its files, the manifest, and the lineage record.

It is generated while it is sent. The same adapter yields the same bytes. With the two records, the unpacked folder can
be verified offline.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 512
END_BYTES = 2 * BLOCK_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveMember:
    """A file of the archive. `read` is called when the member is sent."""

    path: str
    num_bytes: int
    read: Callable[[], Iterator[bytes]]


def inline(path: str, content: bytes) -> ArchiveMember:
    return ArchiveMember(path=path, num_bytes=len(content), read=lambda: iter((content,)))


def tar_chunks(members: list[ArchiveMember], *, modified_at: int) -> Iterator[bytes]:
    """Yield header, content and padding of each file, then the end marker."""
    for member in members:
        yield _header(member, modified_at)
        yield from member.read()
        yield b"\0" * _padding(member)
    yield b"\0" * END_BYTES


def tar_size(members: list[ArchiveMember], *, modified_at: int) -> int:
    """Return the size of the whole archive in bytes."""
    sizes = [len(_header(member, modified_at)) + member.num_bytes + _padding(member) for member in members]
    return sum(sizes) + END_BYTES


def _padding(member: ArchiveMember) -> int:
    return -member.num_bytes % BLOCK_BYTES


def _header(member: ArchiveMember, modified_at: int) -> bytes:
    info = tarfile.TarInfo(member.path)
    info.size = member.num_bytes
    info.mtime = modified_at
    info.mode = 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)
