"""Memory limits and OOM kills of a cgroup: in a container and in a systemd unit, for both cgroup versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from worker.node import cgroup, devices

GIB = 2**30
SECOND = {"memory.max": f"{8 * GIB}", "memory.current": f"{7 * GIB}", "memory.events": "oom 3\noom_kill 2"}
SECOND["memory.stat"] = f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {4 * GIB}"
FIRST = {"memory.limit_in_bytes": f"{8 * GIB}", "memory.usage_in_bytes": f"{7 * GIB}"}
FIRST |= {"memory.oom_control": "oom_kill_disable 0\noom_kill 2", "memory.stat": f"total_inactive_file {4 * GIB}"}


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("own", "place", "files"),
    [
        ("0::/\n", "", SECOND),
        ("0::/system.slice/lorry-worker.service\n", "system.slice/lorry-worker.service", SECOND),
        ("0::/of/the/host\n", "", SECOND),
        ("5:cpu,cpuacct:/x\n4:memory:/lorry\n0::/\n", "memory/lorry", FIRST),
        ("4:memory:/docker/of-the-host\n0::/\n", "memory", FIRST),
    ],
)
def test_the_cgroup_of_a_process_is_found_at_any_path(
    own: str, place: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB, total=64 * GIB))
    group(tmp_path / "tree" / place, files)

    assert (cgroup.oom_kills(), cgroup.limit_bytes()) == (2, 8 * GIB)
    assert cgroup.free_bytes() == devices.free_bytes(devices.cpu()) == 5 * GIB, "page cache counts as free"


@pytest.mark.parametrize(
    ("own", "place", "above", "files", "limit"),
    [
        ("0::/jobs.slice/a.slice/one.service\n", "jobs.slice/a.slice/one.service", "jobs.slice", SECOND, "memory.max"),
        ("4:memory:/jobs/a/one\n", "memory/jobs/a/one", "memory/jobs", FIRST, "memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_parent_cgroup_applies_too(
    own: str, place: str, above: str, files: dict[str, str], limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "tree")
    group(tmp_path / "tree" / place, files)
    group(tmp_path / "tree" / above, files | {limit: f"{4 * GIB}"})
    group(tmp_path, files | {limit: "1"})

    assert (cgroup.free_bytes(), cgroup.limit_bytes()) == (GIB, 4 * GIB)


def test_without_a_limit_the_cgroup_reports_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "none")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    group(tmp_path, SECOND | {"memory.max": "max"})

    assert (cgroup.free_bytes(), cgroup.limit_bytes()) == (None, None)
