"""A worker's membership in its gang: which worker leads, whether enough workers are present, and the round to which it
is called.

Each member polls the gang's rows. Only the leader claims jobs, for all members together.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from catalog.clock import boot_seconds
from catalog.db.database import Database
from catalog.errors import OutOfSpace, Unavailable
from catalog.fleet import gangs
from catalog.fleet.gangs import Call, GangMember, GangState, LiveMember, LivenessTracker, Round
from catalog.settings import Settings
from worker.node.devices import versions
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import place_of

log = logging.getLogger(__name__)
LOST_AFTER = 2 / 3
"""Fraction of a lease. A member that could not reach the database for this time leaves its round."""


class GangMembership:
    """The membership of one worker, created when it registers."""

    def __init__(
        self, settings: Settings, db: Database, worker_id: str, *, kind: str, own_free_bytes: Callable[[], int]
    ) -> None:
        """Raises SystemExit if the settings are invalid on this node."""
        assert settings.gang is not None
        silent_seconds = settings.lease_seconds
        liveness = LivenessTracker(silent_seconds=silent_seconds)
        self.member = GangMember(
            db=db, worker_id=worker_id, gang=settings.gang, silent_seconds=silent_seconds, heard=liveness
        )
        self.address, self.interface = place_of(settings.advertise_address)
        self.round: Round | None = None
        """The round that it leads."""
        self.has_started = False
        """All members have joined that round."""
        self.is_broken = False
        """The trainer of that round was killed, because a member was missing or had failed."""
        self.ended_since: float | None = None
        """When a member's part of that round was first seen to have ended because of a failure elsewhere."""
        self.last_round_id: str | None = None
        """The last round of another leader in which it took part."""
        self.unreported_end: Json | None = None
        """How that part ended, until it is recorded."""
        self._settings = settings
        self._kind = kind
        self._versions = _listed(versions())
        self._warned_of: set[str] = set()
        self._own_free_bytes = own_free_bytes
        self._state: GangState | None = None
        self._polled_at = self._reported_at = self._attended_at = -math.inf
        self._short_since: float | None = None
        self._not_before = -math.inf

    def enter(self, *, num_processes: int) -> None:
        size = self._settings.gang_size
        gangs.enter(
            self.member,
            size=size,
            min_size=min(size, self.fewest),
            kind=self._kind,
            num_processes=num_processes,
            free_bytes=self._own_free_bytes(),
            versions=self._versions,
        )

    def poll(self) -> GangState:
        """Return the state of the gang, which is at most one poll old. Takes the lead if no worker has it. Raises
        Unavailable."""
        began = boot_seconds()
        if self._state is not None and began - self._polled_at < self._settings.poll_seconds:
            return self._state
        if began - self._reported_at >= self._settings.heartbeat_seconds:
            gangs.report_memory(self.member, free_bytes=self._own_free_bytes())
            self._reported_at = began
        found = gangs.standing(self.member)
        if found.leader_id is None and gangs.lead(self.member):
            found = gangs.standing(self.member)
        self._state, self._polled_at = found, began
        return found

    def is_poll_due(self) -> bool:
        """Return whether a poll is due. True at most once per poll interval."""
        began = time.monotonic()
        if began - self._attended_at < self._settings.poll_seconds:
            return False
        self._attended_at = began
        return True

    def may_claim(self) -> bool:
        """Return whether this worker leads and enough members are present. Raises Unavailable."""
        found = self.poll()
        if self.round is not None:
            return not self.is_broken and self.is_open
        if found.leader_id != self.member.worker_id or time.monotonic() < self._not_before:
            return False
        size, num_present = self._settings.gang_size, len(self.to_call())
        if num_present >= size:
            self._short_since = None
            return True
        self._warn_of_others(found)
        self._short_since = self._short_since or time.monotonic()
        short_seconds = time.monotonic() - self._short_since
        return num_present >= self.fewest and short_seconds >= self._settings.gang_wait_seconds

    def _warn_of_others(self, found: GangState) -> None:
        """Log once about each member that can't be called because of its versions."""
        for member in found.members:
            if member.versions != self._versions and member.worker_id not in self._warned_of:
                self._warned_of.add(member.worker_id)
                message = "Worker %s of the gang is not called: it has %s, but this worker, the leader, has %s."
                log.warning(message, member.worker_id, member.versions, self._versions)

    @property
    def is_open(self) -> bool:
        """Whether all members of the round that it leads accept new jobs."""
        members = self._state.members if self._state is not None else ()
        open_ones = {member.worker_id for member in members if member.is_open}
        return self.round is None or open_ones.issuperset(self.round.workers)

    @property
    def fewest(self) -> int:
        """The number of workers that a round needs."""
        return self._settings.gang_min_size or self._settings.gang_size

    def to_call(self) -> list[LiveMember]:
        """Return the members for a round that begins now, with this worker first: at most the size of the gang, with
        devices like its own."""
        members = self._state.members if self._state is not None else ()
        return matching_members(members, self.member.worker_id, size=self._settings.gang_size)

    def open(self, task: Json) -> Round:
        """Open a round and call its members. Raises NotGathered, Unavailable."""
        members = [member.worker_id for member in self.to_call()]
        seconds = self._settings.gang_join_seconds
        self.has_started, self.is_broken, self.ended_since = False, False, None
        self.round = gangs.open_round(self.member, members=members, task=task, seconds=seconds)
        return self.round

    def back_off(self) -> None:
        """Claim nothing for a lease, because no round was formed: the worker at fault may be gone before the next
        one."""
        self._not_before = time.monotonic() + self._settings.lease_seconds

    def least_free_bytes(self, own: int) -> int:
        """Return the lowest free memory of this worker and the members that it has called, or would call now."""
        members = self._state.members if self._state is not None else ()
        called = self.round.workers if self.round is not None else [member.worker_id for member in self.to_call()]
        others = [
            member for member in members if member.worker_id in called and member.worker_id != self.member.worker_id
        ]
        return min([own, *(member.free_bytes for member in others)])

    def called(self) -> Call | None:
        """Return the round of another leader to which it is called and in which it has not taken part yet. Raises
        Unavailable."""
        call = self.poll().call
        return None if call is None or call.round_id == self.last_round_id else call

    def still_called(self, round_id: str) -> Call | None:
        """Return the call. None once the round is over, or the database was unavailable for too long. Never raises."""
        try:
            found = self.poll()
        except (Unavailable, OutOfSpace):
            found = self._state if self._has_polled_recently() else None
        call = found.call if found is not None and found.leader_id is not None else None
        return call if call is not None and call.round_id == round_id else None

    def _has_polled_recently(self) -> bool:
        return boot_seconds() - self._polled_at < LOST_AFTER * self._settings.lease_seconds


def matching_members(members: Sequence[LiveMember], leader_id: str, *, size: int) -> list[LiveMember]:
    """Return the leader and up to `size - 1` other members.

    The others accept new jobs, and have devices of the same kind and the same versions. Members that missed the fewest
    rounds come first, then the oldest. Pure.
    """
    leader = next((member for member in members if member.worker_id == leader_id), None)
    if leader is None or not leader.is_open:
        return []
    candidates = [
        member for member in members if member.is_open and member.kind == leader.kind and member is not leader
    ]
    others = sorted(
        (member for member in candidates if member.versions == leader.versions), key=lambda member: member.num_missed
    )
    return [leader, *others[: size - 1]]


def _listed(found: Mapping[str, str]) -> str:
    """Return the versions as a text. A worker with other versions computes with other code."""
    return ", ".join(f"{name} {version}" for name, version in found.items())[:255]
