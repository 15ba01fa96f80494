"""A member of a gang on its own node: it imports the base model, and truncates its trainer's logs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from catalog.db.database import Database
from catalog.fleet import cordons, gangs
from catalog.fleet.gangs import Round
from catalog.tables.fleet import Worker
from tests.worker.context.test_gang_membership import LOCAL, GangSite, start_once_joined
from tests.worker.pack_site import OUTAGE, PackSite
from tests.worker.scripted_trainer import FakeTrainer
from worker import supervisor
from worker.background import base_models
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext
from worker.gang.gang import gang_of
from worker.session import job_logs


@pytest.fixture
def gang(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> GangSite:
    return GangSite(site, monkeypatch)


def called(gang: GangSite) -> tuple[WorkerContext, Round]:
    """Return the member w2, and its round, which w1 leads."""
    member, leader = gang.seated("w2"), gang.place("w1")
    gang.seated("w1")
    member.settings.bases_dir().mkdir(parents=True, exist_ok=True)
    gangs.lead(leader)
    task = {"trainer_id": "trainer-1", "base_model": "smol", "base_digest": "1", "address": LOCAL, "num_ranks": 2}
    return member, gangs.open_round(leader, members=["w1", "w2"], task={**task, "settings": {}}, seconds=60)


def take_part(member: WorkerContext) -> bool:
    with TaskRunner(member) as tasks:
        return gang_of(member).participate(tasks, supervisor._launch_trainer)  # pyright: ignore[reportPrivateUsage]


def test_an_import_that_outlasts_its_round_continues_for_the_next_one(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, led = called(gang)
    imported: list[str] = []

    def ensure(_: WorkerContext, name: str, _digest: str, is_unwanted: Callable[[], bool] = lambda: False) -> Path:
        gangs.end_round(gang.place("w1"), led.round_id)
        assert not is_unwanted()
        imported.append(name)
        return Path("/bases/here")

    monkeypatch.setattr(base_models, "ensure", ensure)

    assert take_part(member)
    assert imported == ["smol"]
    assert gang.trainers == [], "the round is over"


def test_the_log_of_a_members_trainer_is_truncated(gang: GangSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_logs, "LONGEST_FILE_BYTES", 10)
    monkeypatch.setattr(job_logs, "PUSH_SECONDS", 0.0)
    member, led = called(gang)
    sizes: list[int] = []

    def script(trainer: FakeTrainer) -> Generator[None]:
        log = trainer.directory.log_path
        log.write_text("a line and another one\n")
        yield
        yield
        sizes.append(log.stat().st_size)
        gangs.end_round(gang.place("w1"), led.round_id)
        while True:
            yield

    start_once_joined(gang, monkeypatch)
    gang.script = script

    assert take_part(member)
    assert sizes == [0]


def test_a_member_with_an_unkillable_trainer_retries_to_cordon_itself(
    gang: GangSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, led = called(gang)
    cordon = cordons.cordon_own
    reasons: list[str] = []

    def cordon_own(db: Database, worker_id: str, *, reason: str) -> None:
        reasons.append(reason)
        if len(reasons) == 1:
            raise OUTAGE
        cordon(db, worker_id, reason=reason)

    def script(trainer: FakeTrainer) -> Generator[None]:
        trainer.is_left_behind = True
        gangs.end_round(gang.place("w1"), led.round_id)
        while True:
            yield

    start_once_joined(gang, monkeypatch)
    monkeypatch.setattr(cordons, "cordon_own", cordon_own)
    gang.script = script

    assert take_part(member)

    with gang.site.db.read() as session:
        assert session.get_one(Worker, "w2").cordon is not None
