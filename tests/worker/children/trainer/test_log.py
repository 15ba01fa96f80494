"""Log lines of worker and trainer name their job, claim, trainer, worker and trace."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from catalog import logs, tracing
from tests.json_log import json_log, lines_of
from tests.worker.pack_site import PackSite
from worker.children.trainer.outputs import TrainerLog
from worker.process.launcher import child_environment

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ADMIT = {"claim_id": "claim-1", "job_id": "ftjob-1", "trace": PARENT}


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    with json_log("worker", monkeypatch) as out:
        yield out


def test_log_lines_of_a_trainer_name_job_claim_trainer_and_trace(out: io.StringIO) -> None:
    log = TrainerLog({"trainer_id": "trainer-1"}, logs_events=True)

    assert log.register(ADMIT) == "claim-1"
    log.record_event("claim-1", "checkpointed", {"step": 5, "folder": "/a/path"})
    log.record_event("claim-1", "refused", {"error": {"code": "out_of_memory", "message": "words"}})

    about = {"job": "ftjob-1", "claim": "claim-1", "trainer": "trainer-1", "trace": PARENT[3:35]}
    first, second = lines_of(out)
    assert {name: first[name] for name in about} == {name: second[name] for name in about} == about
    assert (first["message"], first["level"]) == ("checkpointed step=5", "info")
    assert (second["message"], second["level"]) == ("refused code=out_of_memory", "warning")


def test_only_the_leading_rank_logs(out: io.StringIO) -> None:
    log = TrainerLog({"trainer_id": "trainer-1"}, logs_events=False)

    log.record_event(log.register(ADMIT), "admitted", {"step": 0})

    assert lines_of(out) == []


def test_log_lines_of_a_worker_name_job_claim_trainer_and_worker(site: PackSite, out: io.StringIO) -> None:
    claim = site.claim()
    site.context.spans.claimed(claim, worker_id="w1")
    session = site.session(claim)

    def fail(_held: Any) -> None:
        raise OSError("The disk is away.")

    (held,) = session._held.values()  # pyright: ignore[reportPrivateUsage]
    with logs.all_about({"worker": "w1"}):
        session._guarded(held, fail)  # pyright: ignore[reportPrivateUsage]

    (line,) = [line for line in lines_of(out) if line["level"] == "error"]
    about = {"job": claim.job.id, "claim": claim.claim_id, "trainer": "trainer-1", "worker": "w1"}
    assert {name: line[name] for name in about} == about
    assert line["trace"] == tracing.trace_id(tracing.of_job(claim.job.id, None))
    assert "The disk is away." in line["exception"]


def test_the_log_format_is_passed_to_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_LOG_FORMAT", "json")

    assert child_environment()["LORRY_LOG_FORMAT"] == "json"
