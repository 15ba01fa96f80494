"""Two nodes train as one: workers in separate network namespaces share a database and a store, but no memory.

If either of them is lost, the job ends with the bytes of one process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from catalog.db.database import read_clock
from catalog.fleet import gangs
from catalog.jobs.explanation import explain
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Trainer
from tests import tiny_base
from tests.services import namespaces
from tests.services.fault_proxy import fault_proxy
from tests.services.namespaces import Network, Node
from tests.system.test_killed_worker import small_job
from tests.worker_site import WorkerSite, bare_site

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]
LEASE_SECONDS = 12.0
JOB = small_job(max_steps=20, checkpoint_every_steps=5)


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if (hindrance := namespaces.hindrance()) is not None:
        pytest.skip(hindrance)
    with namespaces.network(2) as found:
        yield found


class Nodes:
    """Nodes whose workers form one gang."""

    def __init__(self, site: WorkerSite, database_url: str, **gang: str) -> None:
        self.site = site
        self._shared = {
            "LORRY_DATABASE_URL": database_url,
            "LORRY_STORE_URL": site.settings.resolved_store_url(),
            "LORRY_GANG": "pair",
            **gang,
        }

    def start(self, node: Node, **environment: str) -> subprocess.Popen[bytes]:
        own = {"LORRY_DATA_DIR": str(self.site.folder / node.name), "LORRY_ADVERTISE_ADDRESS": node.address}
        argv = node.argv([sys.executable, "-m", "worker.entrypoints.loop", "--device", "cpu"])
        return self.site.start(argv, **self._shared, **own, **environment)

    def workers_of(self, job_id: str) -> list[str]:
        """Return the workers on which the job's trainer runs."""
        with self.site.db.read() as session:
            trainer = session.get_one(Trainer, self.site.job(job_id).trainer_id)
            return (trainer.report or {}).get("gang", {}).get("workers", [])

    def why(self, job_id: str) -> str:
        caller = self.site.caller
        return str(explain(self.site.db, project_id=caller.project_id, job_id=job_id)["explanation"])


@pytest.fixture
def make_nodes(tmp_path: Path, net: Network, new_postgres_url: str) -> Iterator[Any]:
    url = make_url(new_postgres_url)
    with ExitStack() as stack:
        proxy = stack.enter_context(fault_proxy("127.0.0.1", url.port or 5432, address=net.address))
        given = {"LORRY_DATABASE_URL": new_postgres_url, "LORRY_LEASE_SECONDS": f"{LEASE_SECONDS}"}
        site = stack.enter_context(bare_site(tmp_path, **given))
        site.patience_seconds = 600.0
        site.import_base(tiny_base.make(tmp_path / "base"))
        through = url.set(host=net.address, port=proxy.port).render_as_string(hide_password=False)
        yield lambda **gang: Nodes(site, through, **gang)


def live_seats(site: WorkerSite) -> list[str]:
    """Return the live workers of the gang."""
    with site.db.read() as session:
        found = gangs.gang_views(session, now=read_clock(session), silent_seconds=LEASE_SECONDS)
        return [worker for gang in found for worker in gang.workers]


def trained_alone(site: WorkerSite, rows: str) -> str:
    alone = site.submit(rows, **JOB)
    site.work_until_done()
    assert site.job(alone).state == JobState.SUCCEEDED, site.log()
    return site.weights_digest(alone)


def test_a_job_of_two_nodes_continues_on_one_if_the_other_is_killed(make_nodes: Any, net: Network) -> None:
    nodes = make_nodes(LORRY_GANG_MIN_SIZE="1", LORRY_GANG_WAIT_SECONDS="0")
    site: WorkerSite = nodes.site
    rows = site.upload(60)
    expected = trained_alone(site, rows)
    gate = {"FAILPOINT": f"step_12:wait={site.gate('kill')}"}
    workers = [nodes.start(node, **gate) for node in net.nodes]
    site.wait_until(lambda: len(live_seats(site)) == 2)
    job = site.submit(rows, **JOB)
    site.wait_for_step(12, job)
    leader, member = nodes.workers_of(job)
    assert leader == site.job(job).worker_id
    killed = next(worker for worker in workers if f"-{worker.pid}-" in member)

    killed.kill()
    site.gate("kill").touch()
    site.wait_for_end(job)

    assert site.job(job).state == JobState.SUCCEEDED, site.log()
    assert site.reasons(job) == [EndReason.INFRA_LOST, EndReason.COMPLETED]
    assert member in site.attempts(job)[0].detail
    assert site.attempts(job)[1].resumed_from_step == 10
    assert nodes.workers_of(job) == []
    assert site.weights_digest(job) == expected


def test_a_job_of_two_nodes_waits_for_a_disconnected_one(make_nodes: Any, net: Network) -> None:
    nodes = make_nodes()
    site: WorkerSite = nodes.site
    rows = site.upload(60)
    expected = trained_alone(site, rows)
    gate = {"FAILPOINT": f"step_12:wait={site.gate('cut')}"}
    workers = [nodes.start(node, **gate) for node in net.nodes]
    site.wait_until(lambda: len(live_seats(site)) == 2)
    job = site.submit(rows, **JOB)
    site.wait_for_step(12, job)
    _, member = nodes.workers_of(job)
    cut = next(node for node, worker in zip(net.nodes, workers, strict=True) if f"-{worker.pid}-" in member)

    cut.cut_off()
    try:
        site.gate("cut").touch()
        site.wait_until(lambda: site.job(job).state == JobState.QUEUED)
        site.wait_until(lambda: "1 of 2 workers" in nodes.why(job))
    finally:
        cut.connect()
    site.wait_for_end(job)

    assert site.job(job).state == JobState.SUCCEEDED, site.log()
    assert site.reasons(job) == [EndReason.INFRA_LOST, EndReason.COMPLETED]
    assert site.attempts(job)[1].resumed_from_step == 10
    assert sorted(nodes.workers_of(job)) == sorted(live_seats(site))
    assert site.weights_digest(job) == expected
