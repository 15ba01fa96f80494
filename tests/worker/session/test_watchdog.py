"""How long a worker waits for its trainer before it kills it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from catalog.states import EndReason
from tests.worker.pack_site import READY, PackSite, emit
from tests.worker.scripted_trainer import raising
from worker.process import exit_status
from worker.process.launcher import TrainerProcess
from worker.session.trainer_session import TrainerSession
from worker.session.watchdog import watch_clock


class Process:
    """A trainer that can be killed, and has no real process."""

    def __init__(self, session: TrainerSession) -> None:
        self.directory = session.directory
        self.started_at = session.last_event_at
        self.is_killed = False

    def pids(self) -> list[int]:
        return []

    def kill(self) -> None:
        self.is_killed = True


def is_killed_by_watchdog(
    site: PackSite, session: TrainerSession, *, closing_at: float | None = None, started_at: float | None = None
) -> bool:
    """Return whether a check of the clock kills the session's trainer."""
    process = Process(session)
    process.started_at = process.started_at if started_at is None else started_at
    watch_clock(site.context, cast(TrainerProcess, process), session, closing_at)
    assert process.is_killed == (session.outcome is not None)
    return process.is_killed


def busy_pack(site: PackSite) -> TrainerSession:
    session = site.loading_session(site.claim())
    emit(session, READY)
    session.read_events()
    return session


def test_a_busy_trainer_without_events_is_killed(site: PackSite) -> None:
    session = busy_pack(site)
    session.last_event_at -= site.context.progress_seconds - 60
    assert not is_killed_by_watchdog(site, session)

    session.last_event_at -= 61

    assert is_killed_by_watchdog(site, session)
    assert session.outcome is not None
    assert session.outcome.reason is EndReason.TIMEOUT


def test_a_closing_trainer_that_saves_one_job_after_another_has_more_time(site: PackSite) -> None:
    site.context.drain_seconds, site.context.drain_limit_seconds = 100, 200
    session = busy_pack(site)
    now = session.last_event_at
    assert not is_killed_by_watchdog(site, session, closing_at=now - 140)
    assert is_killed_by_watchdog(site, session, closing_at=now - 201)

    session.outcome = None
    session.last_event_at = now - 101

    assert not is_killed_by_watchdog(site, session, closing_at=now - 40)
    assert is_killed_by_watchdog(site, session, closing_at=now - 101)


def test_a_large_base_model_has_more_time_to_load(site: PackSite, tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(50_000_000_000)
    session = site.loading_session(site.claim())
    session.directory.settings_path.write_text(json.dumps({"base_dir": str(tmp_path)}))
    now = session.last_event_at
    assert not is_killed_by_watchdog(site, session, started_at=now - 1800)

    assert is_killed_by_watchdog(site, session, started_at=now - 2000)

    assert session.outcome is not None
    assert session.outcome.detail == "The base model was not loaded within 1900 s."


def test_a_trainer_whose_stacks_are_unavailable_is_killed(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_status, "dump_stacks", raising(OSError("Input/output error")))
    session = busy_pack(site)
    session.last_event_at -= site.context.progress_seconds + 1

    assert is_killed_by_watchdog(site, session)


def emit_at(session: TrainerSession, *moments: float, kind: str = "memory", verifying: bool = False) -> None:
    """Write events at these moments of the trainer's clock."""
    event = {"type": kind, "verifying": verifying}
    with session.directory.events_path.open("a") as file:
        file.write("".join(json.dumps({**event, "seconds": moment}) + "\n" for moment in moments))


def test_a_trainer_with_long_ticks_may_be_silent_for_longer(site: PackSite) -> None:
    session = busy_pack(site)
    session._last_event_seconds = None  # pyright: ignore[reportPrivateUsage]
    emit_at(session, 1000, 1200)
    session.read_events()
    assert session.longest_silence == 200

    session.last_event_at -= 700
    assert not is_killed_by_watchdog(site, session)
    session.last_event_at -= 400
    assert is_killed_by_watchdog(site, session)


def test_during_a_verification_the_silence_limit_is_shorter(site: PackSite) -> None:
    site.context.verifying_seconds, site.context.progress_seconds = 2000, 10_000
    session = busy_pack(site)
    session.last_event_at -= 2100
    assert not is_killed_by_watchdog(site, session)
    session.last_event_at += 2100

    emit(session, {"type": "memory", "verifying": True})
    session.read_events()
    session.last_event_at -= 1900
    assert not is_killed_by_watchdog(site, session)
    session.last_event_at -= 200

    assert is_killed_by_watchdog(site, session)
    assert session.outcome is not None
    assert (session.outcome.reason, session.outcome.detail) == (
        EndReason.TIMEOUT,
        "The trainer sent no events for 2000 s while it verified an adapter.",
    )


def test_after_a_verification_the_usual_silence_limit_applies(site: PackSite) -> None:
    site.context.verifying_seconds, site.context.progress_seconds = 2000, 10_000
    session = busy_pack(site)
    for verifying in (True, False):
        emit(session, {"type": "memory", "verifying": verifying})
        session.read_events()

    session.last_event_at -= 2100

    assert not is_killed_by_watchdog(site, session)


def test_a_slow_trainer_has_a_longer_limit_during_a_verification(site: PackSite) -> None:
    site.context.verifying_seconds, site.context.progress_seconds = 2000, 10_000
    session = busy_pack(site)
    session._last_event_seconds = None  # pyright: ignore[reportPrivateUsage]
    emit_at(session, 1000, 2000, verifying=True)
    session.read_events()

    session.last_event_at -= 3900
    assert not is_killed_by_watchdog(site, session)
    session.last_event_at -= 200
    assert is_killed_by_watchdog(site, session)


def test_a_worker_that_reads_late_does_not_extend_the_trainers_silence(site: PackSite) -> None:
    session = busy_pack(site)
    session._last_event_seconds = None  # pyright: ignore[reportPrivateUsage]
    session.last_event_at -= 200
    emit_at(session, 1000, 1005)
    session.read_events()
    emit_at(session, 1006, kind="idle")
    emit_at(session, 5000, 5007)
    session.read_events()

    assert session.longest_silence == 7


def test_the_silence_of_an_idle_trainer_does_not_count(site: PackSite) -> None:
    session = busy_pack(site)
    session.apply_directives({})
    for held in list(session._held.values()):  # pyright: ignore[reportPrivateUsage]
        session._drop(held)  # pyright: ignore[reportPrivateUsage]
    session.last_event_at -= 10_000
    assert not is_killed_by_watchdog(site, session)

    session.admit(site.claim(seed=2))

    assert not is_killed_by_watchdog(site, session)
    assert session.longest_silence < 1000
