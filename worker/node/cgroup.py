"""Reads the memory limit, memory usage and OOM kills of this process's cgroup, of version 1 or 2.

A container sees its own group as the root. Elsewhere, for example under systemd, /proc/self/cgroup names the group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The names of one version's files."""

    controller: str
    """The controller's name in /proc/self/cgroup."""
    folder: str
    limit: str
    used: str
    reclaimable: str
    """The entry of memory.stat for page cache that counts as used, but that the kernel frees when memory is needed."""
    events: str


VERSIONS = (
    Names(
        controller="",
        folder="",
        limit="memory.max",
        used="memory.current",
        reclaimable="inactive_file",
        events="memory.events",
    ),
    Names(
        controller="memory",
        folder="memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        reclaimable="total_inactive_file",
        events="memory.oom_control",
    ),
)


def free_bytes() -> int | None:
    """Return how many bytes the group may still allocate, by its own limit and those of its parent groups. None if
    there is no limit."""
    names = _found()[1]
    return min((free for group in _groups() if (free := _free_bytes(group, names)) is not None), default=None)


def _free_bytes(folder: Path, names: Names) -> int | None:
    limit = _number(folder / names.limit)
    if limit is None:
        return None
    used = (_number(folder / names.used) or 0) - (_entry(folder / "memory.stat", names.reclaimable) or 0)
    return max(0, limit - used)


def limit_bytes() -> int | None:
    """Return the lowest limit of the group and its parent groups. None if there is no limit."""
    names = _found()[1]
    return min((limit for group in _groups() if (limit := _number(group / names.limit)) is not None), default=None)


def oom_kills() -> int:
    """Return how many processes of the group the kernel has killed because memory ran out."""
    folder, names = _found()
    return _entry(folder / names.events, "oom_kill") or 0


def _groups() -> list[Path]:
    """Return the folder of the group and those of its parent groups."""
    folder, names = _found()
    top = ROOT / names.folder
    return [folder, *(above for above in folder.parents if above == top or top in above.parents)]


def _found() -> tuple[Path, Names]:
    """Return the group's folder and the names of its files. If the group is unknown, those of version 2's root."""
    return _find(ROOT, OWN)


@cache
def _find(root: Path, own: Path) -> tuple[Path, Names]:
    paths = _paths(own)
    for names in VERSIONS:
        of_version = root / names.folder
        for folder in (of_version / paths.get(names.controller, "").lstrip("/"), of_version):
            if (folder / names.events).exists():
                return folder, names
    return root, VERSIONS[0]


def _paths(own: Path) -> dict[str, str]:
    """Return the group's path in each controller's tree. Version 2 has one tree, with an empty controller name."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return {}
    return {controller: path for _, controllers, path in lines for controller in controllers.split(",")}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _entry(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
