"""The real API server over a seeded data folder, in a child process on loopback."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx

from catalog.jobs import commands
from catalog.tables.jobs import Job
from catalog.tenancy import authentication, projects
from tests.dashboard.seed import Seeded

START_SECONDS = 60
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["api.__main__", "api.server"])
"""Each child is forked from a process that has imported the API server, because that import dominates a start."""


@dataclass(kw_only=True, slots=True)
class Service:
    """A running API server and its catalog."""

    seeded: Seeded
    environment: Mapping[str, str]
    url: str = ""
    """Set by the first start. Later ones use the same port."""
    child: ForkServerProcess | None = None

    def start(self) -> None:
        port = int(self.url.rpartition(":")[2] or 0)
        given = (self.seeded.settings.data_dir, port, dict(self.environment))
        self.child = FORKING.Process(target=_serve, args=given, daemon=True)
        self.child.start()
        self._wait()

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join()
            self.child = None

    def sign_in_link(self) -> str:
        caller = self.seeded.caller
        token = authentication.create_sign_in_link(
            self.seeded.db, api_key_id=caller.api_key_id, pepper=self.seeded.pepper
        )
        return f"{self.url}/dashboard/#/sign-in/{token}"

    def link_of_another_project(self, name: str) -> str:
        """Return a sign-in link of another project, as an attacker with a key could send it."""
        project = projects.ensure(self.seeded.db, name)
        key, _ = authentication.create(self.seeded.db, project_id=project.id, name="lure", pepper=self.seeded.pepper)
        token = authentication.create_sign_in_link(self.seeded.db, api_key_id=key.id, pepper=self.seeded.pepper)
        return f"{self.url}/dashboard/#/sign-in/{token}"

    def browser_secret(self) -> str:
        """Return the session cookie of a signed-in browser."""
        token = self.sign_in_link().partition("#/sign-in/")[2]
        return authentication.exchange_sign_in(self.seeded.db, token=token, pepper=self.seeded.pepper)

    def job(self, suffix: str) -> Job:
        known = commands.list_page(self.seeded.db, project_id=self.seeded.caller.project_id, limit=50).items
        return next(job for job in known if job.suffix == suffix)

    def address(self, place: str) -> str:
        """Return `place` with a job's suffix replaced by the id of the job or the name of its adapter."""
        kind, _, suffix = place.removeprefix("#/").partition("/")
        if not suffix:
            return place
        job = self.job(suffix)
        return f"#/{kind}/{job.adapter_name if kind == 'adapters' else job.id}"

    def log(self) -> str:
        return (self.seeded.settings.data_dir / "api.log").read_text()

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self.child is not None
            assert self.child.is_alive(), self.log()
            try:
                self.url = self.url or _reported_url(self.log())
                if self.url and httpx.get(f"{self.url}/healthz", timeout=2).is_success:
                    return
            except (FileNotFoundError, httpx.TransportError):
                pass
            time.sleep(0.05)
        raise AssertionError(f"The API server did not start.\n{self.log()}")


@contextmanager
def serving(seeded: Seeded, **environment: str) -> Iterator[Service]:
    service = Service(seeded=seeded, environment=environment)
    try:
        service.start()
        yield service
    finally:
        service.stop()
        seeded.db.close()


def _serve(data_dir: Path, port: int, environment: dict[str, str]) -> None:
    """Run `python -m api serve` in the child process."""
    with (data_dir / "api.log").open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ.update(environment, LORRY_DATA_DIR=str(data_dir))

    from api.__main__ import main  # imported late: the test process does not need it

    sys.exit(main(["serve", "--host", "127.0.0.1", "--port", str(port)]))


def _reported_url(log: str) -> str:
    """Return the address in the line that the server prints when it is ready, or "" before."""
    reported = re.search(r'"event": "ready", "url": "([^"]+)"', log)
    return reported[1] if reported else ""
