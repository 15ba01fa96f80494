"""A node's workers as real processes: one for each device group, restarted when they die, stopped by one signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from catalog.fleet import cordons, workers
from catalog.tables.fleet import Worker
from tests.worker_site import WAIT_SECONDS, WorkerSite, bare_site

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
CORES = sorted(os.sched_getaffinity(0))[:2]
GROUPS = [f"cpu:{core}" for core in CORES]


def start(site: WorkerSite) -> subprocess.Popen[bytes]:
    return site.start([sys.executable, "-m", "lorry", "worker", "--groups", *GROUPS], OMP_NUM_THREADS="8")


def living(site: WorkerSite) -> list[Worker]:
    return [worker for worker in workers.list_workers(site.db) if worker.ended_at is None]


def test_each_group_has_a_worker_on_its_own_cores_and_a_dead_one_restarts(tmp_path: Path) -> None:
    with bare_site(tmp_path) as site:
        node = start(site)
        site.wait_until(lambda: len(living(site)) == 2)
        first = {worker.id: worker for worker in living(site)}
        assert sorted(worker.devices[0]["cores"] for worker in first.values()) == [[core] for core in CORES]
        for worker in first.values():
            assert psutil.Process(worker.pid).cpu_affinity() == worker.devices[0]["cores"]
        dead, left = sorted(first)
        os.kill(first[dead].pid, signal.SIGKILL)

        site.wait_until(lambda: {worker.id for worker in living(site)} - first.keys())

        site.wait_until(lambda: dead not in {worker.id for worker in living(site)})  # its successor reported it
        assert left in {worker.id for worker in living(site)}
        node.terminate()
        assert node.wait(WAIT_SECONDS) == 0, site.log()
        assert living(site) == []


def test_a_drained_worker_does_not_restart_and_the_others_continue(tmp_path: Path) -> None:
    with bare_site(tmp_path) as site:
        node = start(site)
        site.wait_until(lambda: len(living(site)) == 2)
        drained, other = living(site)

        cordons.drain(site.db, drained.id)

        site.wait_until(lambda: [worker.id for worker in living(site)] == [other.id])
        site.wait_until(lambda: not psutil.pid_exists(drained.pid))
        assert node.poll() is None
        cordons.drain(site.db, other.id)
        assert node.wait(WAIT_SECONDS) == 0, site.log()


def test_killing_the_node_supervisor_stops_its_workers(tmp_path: Path) -> None:
    with bare_site(tmp_path) as site:
        node = start(site)
        site.wait_until(lambda: len(living(site)) == 2)
        pids = [worker.pid for worker in living(site)]

        node.kill()

        site.wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_overlapping_groups_stop_the_command_with_a_message(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "lorry", "worker", "--groups", f"cpu:{CORES[0]}", GROUPS[0]]

    refused = subprocess.run(
        argv, env=os.environ | {"LORRY_DATA_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )

    assert refused.returncode == 1
    assert f"Core {CORES[0]} is in two groups" in refused.stderr
