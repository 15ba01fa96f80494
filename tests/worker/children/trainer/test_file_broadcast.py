"""Trainers on several machines, which are folders here: the leader broadcasts a job's files to the others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.worker.test_several_processes import WAIT_SECONDS, Launched, digest, launched
from worker.process.exit_status import peer_failure
from worker.protocol.rendezvous import meeting_settings, place_of, reported_port

LOCAL = "127.0.0.1"
JOB = {"max_steps": 6, "hyperparameters": {"batch_size": 16}}


@contextmanager
def two_machines(folder: Path, base_dir: Path) -> Iterator[tuple[Launched, Launched]]:
    """Start one process on the leader and two on the member. They may not have connected yet."""
    _, interface = place_of(LOCAL)
    where: dict[str, Any] = {"address": LOCAL, "interface": interface, "name": "round-1", "num_ranks": 3}
    here = meeting_settings(**where, port=None, first_rank=0)
    with launched(folder / "here", base_dir, num_processes=1, meeting=here) as leader:
        port = wait_for_port(leader)
        there = meeting_settings(**where, port=port, first_rank=1)
        with launched(folder / "there", base_dir, num_processes=2, meeting=there) as member:
            yield leader, member


def wait_for_port(leader: Launched) -> int:
    deadline = time.monotonic() + WAIT_SECONDS
    while (port := reported_port(leader.directory)) is None:
        assert time.monotonic() < deadline, leader.directory.log_tail()
        leader.process.send_heartbeat()
        time.sleep(0.02)
    return port


def wait_for_end(leader: Launched) -> None:
    """Wait until the leader's trainer exits, and send it heartbeats meanwhile."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not leader.process.wait(0.1):
        assert time.monotonic() < deadline, "it keeps running without the other machine"
        leader.process.send_heartbeat()


def finish(leader: Launched) -> str:
    """Return the digest of the job's adapter, after all processes have unloaded."""
    exported = leader.wait_for("exported", "job")
    assert exported["report"]["passed"]
    leader.inbox.send("unload")
    leader.wait_for("unloaded")
    assert leader.process.wait(WAIT_SECONDS)
    return digest(leader.directory.path / exported["folder"] / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_resumed_job_on_two_machines_has_the_bytes_of_one_process(tmp_path: Path, base_dir: Path) -> None:
    """Another job, whose files the member can't write, is rejected and affects nothing else."""
    with launched(tmp_path / "alone", base_dir, num_processes=1) as alone:
        alone.admit("job", **JOB)
        whole = finish(alone)
        saved = alone.directory.checkpoint_path("job", 3)

        with two_machines(tmp_path, base_dir) as (leader, member):
            blocked = member.directory.job_path("blocked")
            (blocked / "train" / "tokens.safetensors").mkdir(parents=True)
            leader.admit("blocked", **JOB)
            assert leader.wait_for("refused", "blocked")["error"]["code"] == "disk_error"
            resume = leader.directory.job_path("job") / "resume" / "step-3"
            shutil.copytree(saved, resume)
            leader.admit("job", resume=resume, **JOB)
            assert leader.wait_for("admitted", "job")["step"] == 3
            assert leader.wait_for("ready")["num_processes"] == 3
            together = finish(leader)

            assert member.process.wait(WAIT_SECONDS)
            assert member.process.returncode == 0, member.directory.log_tail()
            assert member.reader.read() == []
            assert not member.directory.job_path("job").exists()
            assert not blocked.exists(), "received files remain on a disk that may be full"
    assert together == whole


@pytest.mark.slow
def test_trainers_listen_only_at_the_leaders_address_and_exit_together(tmp_path: Path, base_dir: Path) -> None:
    with two_machines(tmp_path, base_dir) as (leader, member):
        leader.wait_for("ready")
        listening = {address for launched in (leader, member) for _, address in launched.listeners()}
        leader.admit("job", max_steps=5000, hyperparameters={"batch_size": 8})
        leader.wait_for("stepped", "job")

        member.process.kill()

        assert listening == {LOCAL}
        wait_for_end(leader)
        failure = peer_failure(leader.directory.log_tails(16_000), ranks=range(1), returncode=leader.process.returncode)
        assert failure.is_echo, leader.directory.log_tail()
