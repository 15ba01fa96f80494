"""How long a worker waits for its trainer before it ends it."""

from __future__ import annotations

import json
from typing import cast

import pytest

from catalog.states import EndReason
from tests.worker.pack_site import READY, PackSite, say
from tests.worker.scripted_trainer import raising
from worker.process import exit_status
from worker.process.launcher import TrainerProcess
from worker.session.trainer_session import TrainerSession
from worker.session.watchdog import watch_clock


class Process:
    """A trainer that can be ended, and has no process that could be asked anything."""

    def __init__(self, session: TrainerSession) -> None:
        self.directory = session.directory
        self.started_at = session.heard_at
        self.is_killed = False

    def pids(self) -> list[int]:
        return []

    def kill(self) -> None:
        self.is_killed = True


def looked_at(site: PackSite, session: TrainerSession) -> bool:
    """Whether a look at the clock ends its trainer."""
    process = Process(session)
    watch_clock(site.context, cast(TrainerProcess, process), session, None)
    assert process.is_killed == (session.outcome is not None)
    return process.is_killed


def busy_pack(site: PackSite) -> TrainerSession:
    session = site.loading_session(site.claim())
    say(session, READY)
    session.read_events()
    return session


def test_a_busy_trainer_that_says_nothing_is_ended(site: PackSite) -> None:
    session = busy_pack(site)
    session.heard_at -= site.context.progress_seconds - 60
    assert not looked_at(site, session)

    session.heard_at -= 61

    assert looked_at(site, session)
    assert session.outcome is not None
    assert session.outcome.reason is EndReason.TIMEOUT


def test_one_whose_stacks_can_not_be_had_is_ended_all_the_same(site: PackSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_status, "dump_stacks", raising(OSError("Input/output error")))
    session = busy_pack(site)
    session.heard_at -= site.context.progress_seconds + 1

    assert looked_at(site, session)


def say_at(session: TrainerSession, *moments: float, kind: str = "memory", verifying: bool = False) -> None:
    """By the trainer's clock."""
    told = {"type": kind, "verifying": verifying}
    with session.directory.events_path.open("a") as file:
        file.write("".join(json.dumps({**told, "seconds": moment}) + "\n" for moment in moments))


def test_a_trainer_whose_ticks_take_long_may_be_silent_for_longer(site: PackSite) -> None:
    session = busy_pack(site)
    session._said_at = None  # pyright: ignore[reportPrivateUsage]
    say_at(session, 1000, 1200)
    session.read_events()
    assert session.longest_silence == 200

    session.heard_at -= 700
    assert not looked_at(site, session)
    session.heard_at -= 400
    assert looked_at(site, session)


def test_amid_a_verification_in_which_it_speaks_at_every_linear_it_may_be_silent_for_less(site: PackSite) -> None:
    site.context.verifying_seconds, site.context.progress_seconds = 2000, 10_000
    session = busy_pack(site)
    session.heard_at -= 2100
    assert not looked_at(site, session)
    session.heard_at += 2100

    say(session, {"type": "memory", "verifying": True})
    session.read_events()
    session.heard_at -= 1900
    assert not looked_at(site, session)
    session.heard_at -= 200

    assert looked_at(site, session)
    assert session.outcome is not None
    assert (session.outcome.reason, session.outcome.detail) == (
        EndReason.TIMEOUT,
        "The trainer sent no events for 2000 s while it verified an adapter.",
    )


def test_after_a_verification_it_has_as_long_as_before_it(site: PackSite) -> None:
    site.context.verifying_seconds, site.context.progress_seconds = 2000, 10_000
    session = busy_pack(site)
    for verifying in (True, False):
        say(session, {"type": "memory", "verifying": verifying})
        session.read_events()

    session.heard_at -= 2100

    assert not looked_at(site, session)


def test_a_verification_of_a_slow_trainer_has_its_pace(site: PackSite) -> None:
    site.context.verifying_seconds, site.context.progress_seconds = 2000, 10_000
    session = busy_pack(site)
    session._said_at = None  # pyright: ignore[reportPrivateUsage]
    say_at(session, 1000, 2000, verifying=True)
    session.read_events()

    session.heard_at -= 3900
    assert not looked_at(site, session)
    session.heard_at -= 200
    assert looked_at(site, session)


def test_a_worker_that_was_slow_to_hear_takes_no_trainer_for_a_slow_one(site: PackSite) -> None:
    session = busy_pack(site)
    session._said_at = None  # pyright: ignore[reportPrivateUsage]
    session.heard_at -= 200
    say_at(session, 1000, 1005)
    session.read_events()
    say_at(session, 1006, kind="idle")
    say_at(session, 5000, 5007)
    session.read_events()

    assert session.longest_silence == 7


def test_what_an_idle_trainer_did_not_say_is_not_held_against_it(site: PackSite) -> None:
    session = busy_pack(site)
    session.apply_directives({})
    for held in list(session._held.values()):  # pyright: ignore[reportPrivateUsage]
        session._drop(held)  # pyright: ignore[reportPrivateUsage]
    session.heard_at -= 10_000
    assert not looked_at(site, session)

    session.admit(site.claim(seed=2))

    assert not looked_at(site, session)
    assert session.longest_silence < 1000
