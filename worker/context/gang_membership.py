"""A worker's seat in its gang: who leads, whether enough are there to begin, and to which round it is called.

Each member looks at the gang's rows every now and then; the leader alone claims jobs, for all of them together.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

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
"""Of a lease: a member that could not ask the database for so long goes on with no round."""


class Seat:
    """Of one worker; made when it registers."""

    def __init__(
        self, settings: Settings, db: Database, worker_id: str, *, kind: str, own_free_bytes: Callable[[], int]
    ) -> None:
        """Ends the program where the settings can't be followed."""
        assert settings.gang is not None
        silent = settings.lease_seconds
        heard = LivenessTracker(silent_seconds=silent)
        self.place = GangMember(db=db, worker_id=worker_id, gang=settings.gang, silent_seconds=silent, heard=heard)
        self.address, self.interface = place_of(settings.advertise_address)
        self.round: Round | None = None
        """That it leads."""
        self.has_started = False
        """That round: all have joined."""
        self.is_broken = False
        """Of that round one was seen to be missing, for which its trainer was killed."""
        self.ended_since: float | None = None
        """Of that round the part of one was seen to have ended, for another's end."""
        self.had: str | None = None
        """The round of another's in which it had its part last."""
        self.owed: Json | None = None
        """How that part ended, until the record has it."""
        self._settings = settings
        self._kind = kind
        self._versions = _listed(versions())
        self._warned_of: set[str] = set()
        self._own_free_bytes = own_free_bytes
        self._standing: GangState | None = None
        self._looked_at = self._reported_at = self._attended_at = -math.inf
        self._short_since: float | None = None
        self._not_before = -math.inf

    def enter(self, *, num_processes: int) -> None:
        size = self._settings.gang_size
        gangs.enter(
            self.place,
            size=size,
            min_size=min(size, self.fewest),
            kind=self._kind,
            num_processes=num_processes,
            free_bytes=self._own_free_bytes(),
            versions=self._versions,
        )

    def look(self) -> GangState:
        """How the gang stands, a poll ago at most. Takes the lead where nobody has it. Raises Unavailable."""
        began = time.monotonic()
        if self._standing is not None and began - self._looked_at < self._settings.poll_seconds:
            return self._standing
        if began - self._reported_at >= self._settings.heartbeat_seconds:
            gangs.tell(self.place, free_bytes=self._own_free_bytes())
            self._reported_at = began
        found = gangs.standing(self.place)
        if found.leader_id is None and gangs.lead(self.place):
            found = gangs.standing(self.place)
        self._standing, self._looked_at = found, began
        return found

    def is_look_due(self) -> bool:
        """Once a poll."""
        began = time.monotonic()
        if began - self._attended_at < self._settings.poll_seconds:
            return False
        self._attended_at = began
        return True

    def may_claim(self) -> bool:
        """Whether this worker leads, and enough of the gang are there. Raises Unavailable."""
        found = self.look()
        if self.round is not None:
            return not self.is_broken and self.is_open
        if found.leader_id != self.place.worker_id or time.monotonic() < self._not_before:
            return False
        size, num_there = self._settings.gang_size, len(self.to_call())
        if num_there >= size:
            self._short_since = None
            return True
        self._warn_of_others(found)
        self._short_since = self._short_since or time.monotonic()
        short_for = time.monotonic() - self._short_since
        return num_there >= self.fewest and short_for >= self._settings.gang_wait_seconds

    def _warn_of_others(self, found: GangState) -> None:
        """Once of each that is there and can't be called."""
        for member in found.members:
            if member.versions != self._versions and member.worker_id not in self._warned_of:
                self._warned_of.add(member.worker_id)
                message = "Worker %s of the gang has %s, and this one, which leads, has %s: it is not called."
                log.warning(message, member.worker_id, member.versions, self._versions)

    @property
    def is_open(self) -> bool:
        """Whether all of the round that it leads may take something new."""
        members = self._standing.members if self._standing is not None else ()
        open_ones = {member.worker_id for member in members if member.is_open}
        return self.round is None or open_ones.issuperset(self.round.workers)

    @property
    def fewest(self) -> int:
        """With fewer workers nothing begins."""
        return self._settings.gang_min_size or self._settings.gang_size

    def to_call(self) -> list[LiveMember]:
        """Those of a round that begins now, itself first: as many as the gang has, with devices like its own."""
        members = self._standing.members if self._standing is not None else ()
        return alike(members, self.place.worker_id, size=self._settings.gang_size)

    def open(self, task: Json) -> Round:
        """Call those. Raises NotGathered, Unavailable."""
        members = [member.worker_id for member in self.to_call()]
        seconds = self._settings.gang_join_seconds
        self.has_started, self.is_broken, self.ended_since = False, False, None
        self.round = gangs.open_round(self.place, members=members, task=task, seconds=seconds)
        return self.round

    def wait_a_while(self) -> None:
        """A round did not come about: who was to blame may be gone before the next one."""
        self._not_before = time.monotonic() + self._settings.lease_seconds

    def least_free_bytes(self, own: int) -> int:
        """Of those that it has called, or would call now."""
        members = self._standing.members if self._standing is not None else ()
        called = self.round.workers if self.round is not None else [one.worker_id for one in self.to_call()]
        others = [one for one in members if one.worker_id in called and one.worker_id != self.place.worker_id]
        return min([own, *(member.free_bytes for member in others)])

    def called(self) -> Call | None:
        """The round of another's to which it is called, and has not had its part in. Raises Unavailable."""
        call = self.look().call
        return None if call is None or call.round_id == self.had else call

    def still_called(self, round_id: str) -> Call | None:
        """None once the round is over, or nobody could be asked for too long. Never raises."""
        try:
            found = self.look()
        except (Unavailable, OutOfSpace):
            found = self._standing if self._has_asked_lately() else None
        call = found.call if found is not None and found.leader_id is not None else None
        return call if call is not None and call.round_id == round_id else None

    def _has_asked_lately(self) -> bool:
        return time.monotonic() - self._looked_at < LOST_AFTER * self._settings.lease_seconds


def alike(members: Sequence[LiveMember], leader_id: str, *, size: int) -> list[LiveMember]:
    """The leader, and of those that may begin, have devices of its kind and the same versions, those that the fewest
    rounds before did not begin for, the eldest first. Pure."""
    leader = next((member for member in members if member.worker_id == leader_id), None)
    if leader is None or not leader.is_open:
        return []
    of_kind = [one for one in members if one.is_open and one.kind == leader.kind and one is not leader]
    others = sorted((one for one in of_kind if one.versions == leader.versions), key=lambda one: one.num_missed)
    return [leader, *others[: size - 1]]


def _listed(found: Mapping[str, str]) -> str:
    """Whoever has others computes with other code."""
    return ", ".join(f"{name} {version}" for name, version in found.items())[:255]
