"""A worker that can't exit after a first signal: a second one stops it immediately, with Celery and with the loop.

The catalog handles this like a power cut: see test_killed_worker.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import redis

from catalog.fleet import workers
from tests.worker_site import WAIT_SECONDS, WorkerSite, bare_site

AT_ONCE_SECONDS = 30
"""Far less than the hanging work would take."""
HANGS = """
import pathlib, time
def hang(context):
    pathlib.Path({hangs!r}).touch()
    while not context.draining:
        time.sleep(0.05)
    pathlib.Path({heard!r}).touch()
    time.sleep(900)
"""
LOOP = f"""{HANGS}
from worker.entrypoints import loop
loop.supervise = hang
loop.main(["--device", "cpu"])
"""
CELERY = f"""{HANGS}
from worker.entrypoints import celery_app
celery_app.supervise = hang
celery_app.app.worker_main("worker -c 1 -Q lorry -l info --without-gossip --without-mingle".split())
"""
NOTIFY = "from worker.entrypoints.celery_app import app; app.send_task('lorry.work')"


def start(site: WorkerSite, program: str) -> subprocess.Popen[bytes]:
    marks = {name: str(site.folder / name) for name in ("hangs", "heard")}
    return site.start([sys.executable, "-c", program.format(**marks)])


def terminate_twice(site: WorkerSite, worker: subprocess.Popen[bytes]) -> None:
    """Assert that the worker waits after the first signal, and exits on the second."""
    site.wait_until((site.folder / "hangs").exists)
    below = psutil.Process(worker.pid).children(recursive=True)
    worker.terminate()
    site.wait_until((site.folder / "heard").exists)
    assert worker.poll() is None

    worker.terminate()

    assert worker.wait(AT_ONCE_SECONDS) == 128 + signal.SIGTERM, site.log()
    site.wait_until(lambda: not any(child.is_running() for child in below))


def test_a_second_signal_stops_the_loop_immediately(tmp_path: Path) -> None:
    with bare_site(tmp_path) as site:
        terminate_twice(site, start(site, LOOP))

        assert [worker.ended_at for worker in workers.list_workers(site.db)] == [None]  # as after a power cut


def test_a_second_signal_stops_celery_and_its_pool_immediately(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        worker = start(site, CELERY)
        assert site.start([sys.executable, "-c", NOTIFY]).wait(WAIT_SECONDS) == 0, site.log()

        terminate_twice(site, worker)
