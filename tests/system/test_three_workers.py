"""The whole distributed stack, as docs/internals/run-the-stack-by-hand.md starts it.

Twelve jobs run on three workers. One worker is killed and one drained, and Redis loses all data. `pytest -s` prints the
cost of each fault.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from lorry import Lorry
from lorry.models import Attempt
from lorry.view import FINAL_STATUSES
from tests import tiny_base
from tests.services.postgres import as_role, role_of
from tests.services.redis import redis_server
from tests.services.s3 import new_bucket
from tests.worker_site import ROOT, wait_until

TEST_SECONDS = 900
pytestmark = [pytest.mark.timeout(TEST_SECONDS), pytest.mark.slow]
CELERY = [sys.executable, "-m", "celery", "--app=worker.entrypoints.celery_app"]
WORKER = ["worker", "--queues=lorry", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=INFO"]
NUM_JOBS, NUM_EPOCHS = 12, 20
"""Each epoch has fifteen steps: enough that no machine finishes them before its workers are hit."""
JOB = {
    "lora": {"rank": 4},
    "hyperparameters": {"n_epochs": NUM_EPOCHS, "batch_size": 4},
    **{"checkpoint_every_steps": 10, "seed": 1, "precision": "float32"},
}
DRAIN_SECONDS = 60.0
"""Less than the 90 s that docs/how-to/deploy.md and deploy/ give a worker to exit."""


class Stack:
    """Processes of one service, with addresses of this machine; each logs to a file of its own."""

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "LORRY_DATA_DIR": str(folder / "data"),
            "LORRY_DEVICE": "cpu",
            "LORRY_MAX_JOBS_PER_TRAINER": "4",
            "LORRY_STANDBY_TRAINER": "false",
            "LORRY_PEPPER": "a pepper for twelve jobs and three workers",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **addresses,
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def environment_of(self, argv: Sequence[str]) -> dict[str, str]:
        """Return the environment with the database role of such a process."""
        url = as_role(self.environment["LORRY_DATABASE_URL"], role_of(argv))
        return {**self.environment, "LORRY_DATABASE_URL": url}

    def run_json(self, *command: str) -> dict[str, Any]:
        argv = [sys.executable, "-m", "api", *command]
        done = subprocess.run(argv, env=self.environment, cwd=ROOT, capture_output=True, check=True, timeout=250)
        return json.loads(done.stdout)

    def start(self, name: str, argv: list[str], *, is_read: bool = False) -> subprocess.Popen[bytes]:
        """is_read: the caller reads the output."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                argv, env=self.environment_of(argv), cwd=ROOT, stdout=subprocess.PIPE if is_read else log, stderr=log
            )
        self._processes.append(process)
        return process

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        return self.start(name, [*CELERY, *WORKER, f"--hostname={name}@%h"])

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait up to the time limit of the test, because a busy machine may be slow.

        The interval is long, because each poll sends many requests to the API server.
        """
        wait_until(condition, message=self.logs, seconds=TEST_SECONDS, every_seconds=0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def redis_of_its_own() -> Iterator[str]:
    with redis_server() as url:
        yield url


@contextmanager
def running(folder: Path, addresses: dict[str, str]) -> Iterator[tuple[Stack, Lorry]]:
    stack = Stack(folder, addresses)
    with ExitStack() as exits:
        exits.callback(stack.close)
        key = stack.run_json("bootstrap", "--json")["api_key"]
        api = stack.start("api", [sys.executable, "-m", "api", "serve", "--port", "0"], is_read=True)
        assert api.stdout is not None
        url = json.loads(api.stdout.readline())["url"]
        yield stack, exits.enter_context(Lorry(url, key))


def test_twelve_jobs_survive_a_killed_and_a_drained_worker_and_a_redis_flush(
    tmp_path: Path, new_postgres_url: str, redis_of_its_own: str, s3_endpoint: str
) -> None:
    bucket = new_bucket(s3_endpoint)
    addresses = {"LORRY_DATABASE_URL": new_postgres_url, "LORRY_REDIS_URL": redis_of_its_own}
    addresses |= {"LORRY_STORE_URL": f"s3://{bucket.name}", **bucket.environment()}
    base, rows = tiny_base.make(tmp_path / "base"), tiny_base.write_chat(tmp_path / "chats.jsonl", 60)
    with running(tmp_path, addresses) as (stack, lorry):
        workers = {name: stack.worker(name) for name in ("killed", "drained", "stays")}
        lorry.models.add("tiny", str(base))
        lorry.models.wait("tiny")
        file = lorry.files.upload(rows)
        began = time.monotonic()
        body = {"model": "tiny", "training_file": file.id, **JOB}
        ids = [lorry.jobs.create(**body, suffix=f"n{number}").id for number in range(NUM_JOBS)]
        forget(redis_of_its_own)
        stack.wait_until(lambda: len(holders(lorry, ids)) == len(workers))
        assert max(holders(lorry, ids).values()) <= 4
        report("twelve jobs on three workers", began)
        ours = {name: worker_of(lorry, process) for name, process in workers.items()}
        hit, left = held_by(lorry, ids, ours["killed"]), held_by(lorry, ids, ours["drained"])
        stack.wait_until(lambda: all(has_checkpoint(lorry, job_id) for job_id in (*hit, *left)))
        report("a checkpoint of each", began)

        workers["killed"].kill()
        killed = time.monotonic()
        workers["drained"].terminate()
        forget(redis_of_its_own)
        assert workers["drained"].wait(DRAIN_SECONDS) == 0, stack.logs()
        report(f"the drained worker has released {len(left)} jobs and exited", killed)
        stack.wait_until(lambda: ours["killed"] not in holders(lorry, hit))
        report(f"{len(hit)} jobs of the killed worker are free again", killed)
        stack.worker("new")
        stack.wait_until(lambda: all(lorry.jobs.get(job_id).status in FINAL_STATUSES for job_id in ids))
        report("all jobs have finished", began)

        names = {worker_id: name for name, worker_id in ours.items()}
        for job_id in ids:
            story = [(names.get(a.worker_id, "new"), a.reason, a.resumed_from_step) for a in attempts(lorry, job_id)]
            print("killed" if job_id in hit else "drained" if job_id in left else "", story)  # noqa: T201
        assert {lorry.jobs.get(job_id).status for job_id in ids} == {"succeeded"}, stack.logs()
        assert hit
        assert left
        for job_id, reason in [*((job_id, "infra_lost") for job_id in hit), *((job_id, "drained") for job_id in left)]:
            assert [attempt.reason for attempt in attempts(lorry, job_id)] == [reason, "completed"]
            assert (attempts(lorry, job_id)[1].resumed_from_step or 0) > 0
        adapters = list(lorry.adapters.list())
        assert sorted(adapter.raw["job_id"] for adapter in adapters) == sorted(ids)
        assert all(lorry.adapters.verify(adapter.name)["passed"] for adapter in adapters)
        assert len({weights(lorry, adapter.name) for adapter in adapters}) == 1, "the same job has the same bytes"


def forget(redis_url: str) -> None:
    redis.Redis.from_url(redis_url).flushall()


def holders(lorry: Lorry, ids: list[str]) -> Counter[str]:
    """Return the workers that hold running attempts of these jobs, with the number of attempts."""
    live = [attempt for job_id in ids for attempt in attempts(lorry, job_id) if attempt.ended_at is None]
    return Counter(attempt.worker_id for attempt in live)


def held_by(lorry: Lorry, ids: list[str], worker_id: str) -> list[str]:
    return [job_id for job_id in ids if worker_id in holders(lorry, [job_id])]


def worker_of(lorry: Lorry, process: subprocess.Popen[bytes]) -> str:
    """Return the worker's id, which names the pool process, a child of Celery's main process."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(w.id for w in lorry.workers.list() for child in children if f"-{child}-" in w.id)


def attempts(lorry: Lorry, job_id: str) -> list[Attempt]:
    return lorry.jobs.attempts(job_id)


def has_checkpoint(lorry: Lorry, job_id: str) -> bool:
    return next(iter(lorry.jobs.checkpoints(job_id)), None) is not None


def weights(lorry: Lorry, name: str) -> str:
    files = lorry.adapters.manifest(name)["data"]
    return next(file["digest"] for file in files if file["path"] == "adapter_model.safetensors")


def report(what: str, since: float) -> None:
    print(f"{time.monotonic() - since:6.1f} s: {what}")  # noqa: T201
