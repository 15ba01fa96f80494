"""Who is to blame for what ends before a trainer has begun a job: the node or the base, and never the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catalog import cordons
from catalog.errors import OutOfSpace
from catalog.states import EndReason
from catalog.tables import Worker
from tests.worker.pack_site import PackSite
from tests.worker.scripted_trainer import FakeTrainer, Script, loads_for_ever, reasons
from worker import admission, bases, node, supervise
from worker.trainer_directory import TrainerDirectory

FULL = OutOfSpace("The disk is full.", code="out_of_space", remedy="Free some space.")
Run = Callable[[Script], None]


@pytest.fixture
def run(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Supervise until nothing is left that is due, every trainer following the script; then let the longest wait of a
    job that is tried again pass."""
    site.context.scratch_dir().mkdir()
    monkeypatch.setattr(bases, "ensure", lambda *_, **__: Path("/nowhere"))
    monkeypatch.setattr(node, "free_bytes", lambda _: 10**12)

    def run(script: Script) -> None:
        def launch(
            directory: TrainerDirectory, _device: node.Device, *, silence_seconds: float, num_processes: int
        ) -> FakeTrainer:
            return FakeTrainer(directory, script)

        monkeypatch.setattr(supervise, "launch", launch)
        supervise.supervise(site.context)
        site.world.clock.turn(31)
        site.world.beat(worker_id="w1")

    return run


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def cordon_of(site: PackSite, worker_id: str = "w1") -> dict[str, Any] | None:
    with site.db.read() as session:
        return session.get_one(Worker, worker_id).cordon


def test_a_node_whose_disk_is_full_puts_no_job_aside_and_is_cordoned(
    site: PackSite, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = site.queued()
    monkeypatch.setattr(bases, "ensure", raising(FULL))

    for _ in range(4):
        run(loads_for_ever)

    now, cordon = site.world.job(job.id), cordon_of(site)
    assert (now.state, now.counted_attempts) == ("queued", 0)
    assert reasons(site, job.id) == [EndReason.NODE_FAILED] * 3
    assert cordon is not None
    assert (cordon["by"], cordon["reason"]) == ("service", cordons.BEFORE_ANY_JOB)


def test_a_disk_that_is_full_when_a_job_is_to_be_handed_over_costs_it_no_attempt(
    site: PackSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, late = site.pack(), site.claim()
    pack.admit(late)
    monkeypatch.setattr(admission, "bring_files", raising(FULL))

    pack.hand_over()

    job = site.world.job(late.job.id)
    assert (job.state, job.counted_attempts, site.reason(late)) == ("queued", 0, EndReason.NODE_FAILED)
