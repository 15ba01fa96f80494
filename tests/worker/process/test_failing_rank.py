"""A trainer of two processes of which one fails: both exit soon, and the worker reports the error of that one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from catalog.states import EndReason
from tests.worker.test_several_processes import launched
from worker.process.exit_status import classify_exit

SOON_SECONDS = 120.0
"""Limit for the processes to exit on a busy machine. A process that waits for the failed one waits for an hour."""


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["step_2@1:raise", "in_checkpoint@0:raise"])
def test_a_failed_process_stops_all_and_its_error_is_the_trainers(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str
) -> None:
    monkeypatch.setenv("FAILPOINT", failpoint)
    with launched(tmp_path / "two", base_dir, num_processes=2) as trainer:
        trainer.wait_for("ready")
        ranks = trainer.ranks()
        trainer.admit("job", max_steps=5000, hyperparameters={"batch_size": 8})

        assert trainer.process.wait(SOON_SECONDS), "it waits for the failed process"

        assert psutil.wait_procs(ranks, timeout=SOON_SECONDS)[1] == []
        log_tail = trainer.directory.log_tail(max_bytes=16_000)
        reason, detail = classify_exit(
            trainer.process.returncode or 0, log_tail, num_oom_kills=0, device_kind="cpu", is_disk_full=False
        )
    assert reason is EndReason.TRAINER_CRASHED
    assert f"failpoint {failpoint.partition('@')[0]}" in detail, log_tail
