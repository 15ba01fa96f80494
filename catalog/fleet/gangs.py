"""Gangs: workers of several nodes lend their devices to one of them, which claims jobs for all. All join, or none.

A round is one trainer over some members: opened by the leader, joined by each, started once all have, and over for
all at once. Every verb locks the gang's row first and names its round: who names another is told NotGathered.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from catalog.db.database import Database, add_if_missing, read_clock
from catalog.errors import Conflict
from catalog.fleet import cordons
from catalog.states import EndReason
from catalog.tables.fleet import SILENT_SECONDS, Gang, GangSeat, Worker
from catalog.tables.table import Json, new_id

MAX_FAILED = 3
"""Rounds in which a member may have no part for a reason of its own, with none in between that began."""
OF_FAILED = f"It could not take part in {MAX_FAILED} trainers of its gang running."
SINGLE = "There is nothing to do: it is tried again with those that are there."


class NotGathered(Conflict):
    """A round can't begin without one of its members, or is over."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="gang_incomplete", remedy=SINGLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class GangMember:
    """Who asks: a worker, as a member of its gang."""

    db: Database
    worker_id: str
    gang: str
    silent_seconds: float
    """Who was not heard from for so long lives no more."""
    heard: LivenessTracker | None = None
    """By one that looks again and again: where the database's clock is set, who lives is not taken for dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveMember:
    """A worker of the gang that lives."""

    worker_id: str
    host: str
    kind: str
    num_processes: int
    free_bytes: int
    is_open: bool
    """It is neither cordoned nor to leave."""
    versions: str = ""
    num_missed: int = 0
    """See GangSeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The round that a member is called to, and its part of it."""

    round_id: str
    first_rank: int
    task: Json
    has_joined: bool
    port: int | None
    """Of the leader's trainer, once the round has started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GangState:
    """A gang as one of its members sees it."""

    leader_id: str | None
    """None where nobody leads who lives."""
    members: tuple[LiveMember, ...]
    """Those that live, the eldest first."""
    call: Call | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One that its leader has opened."""

    round_id: str
    num_ranks: int
    """Processes of all its trainers together."""
    workers: list[str]
    first_ranks: list[int]
    """Of each of them the number of its first process."""

    def worker_of(self, rank: int) -> str:
        return self.workers[bisect_right(self.first_ranks, rank) - 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundState:
    """Of a round, for its leader."""

    num_others: int
    """Members of it beside the leader."""
    not_joined: tuple[str, ...]
    lost: tuple[str, ...]
    """Members that have ended, or were not heard from for too long."""
    ended: dict[str, Json]
    """How the parts of members have ended, by worker; see GangSeat."""
    is_anyone_leaving: bool
    is_late: bool
    """Its time for gathering is over."""


def enter(
    place: GangMember, *, size: int, min_size: int, kind: str, num_processes: int, free_bytes: int, versions: str = ""
) -> None:
    """A worker that has registered takes its seat. Seats of workers that have ended go."""
    with place.db.write() as session:
        add_if_missing(session, Gang, {"name": place.gang, "size": size, "min_size": min_size})
        row = _locked(session, place.gang)
        row.size, row.min_size = size, min_size
        gone = select(Worker.id).where(Worker.ended_at.is_not(None))
        session.execute(delete(GangSeat).where(GangSeat.gang == place.gang, GangSeat.worker_id.in_(gone)))
        seat = session.get(GangSeat, place.worker_id) or GangSeat(worker_id=place.worker_id)
        seat.gang, seat.kind, seat.num_processes, seat.free_bytes = place.gang, kind, num_processes, free_bytes
        seat.versions, seat.round_id, seat.is_leaving = versions, None, False
        seat.num_missed = seat.num_failed = 0
        session.add(seat)


def tell(place: GangMember, *, free_bytes: int) -> None:
    """How much memory each process of a trainer could take on this member now."""
    with place.db.write() as session:
        seat = session.get(GangSeat, place.worker_id, with_for_update=True)
        if seat is not None:
            seat.free_bytes = free_bytes


def standing(place: GangMember) -> GangState:
    with place.db.read() as session:
        row = session.get_one(Gang, place.gang)
        members = tuple(_member(seat, worker) for seat, worker in _live(session, place))
        call = _call(row, session.get(GangSeat, place.worker_id))
        return GangState(leader_id=row.leader_id if _is_led(row, members) else None, members=members, call=call)


def lead(place: GangMember) -> bool:
    """Take the lead where nobody has it who lives, and may begin something or has; what its last leader had begun is
    over. True for who has it."""
    with place.db.write() as session:
        row = _locked(session, place.gang)
        members = [_member(seat, worker) for seat, worker in _live(session, place)]
        is_able = any(member.worker_id == place.worker_id and member.is_open for member in members)
        if is_able and not _is_led(row, members):
            _clear(row)
            row.leader_id = place.worker_id
        return row.leader_id == place.worker_id


def open_round(place: GangMember, *, members: Sequence[str], task: Json, seconds: float) -> Round:
    """Call these members, of whom the leader is one. Another round of the leader's is over by that. seconds: within
    which all have to join. Raises NotGathered where one can't be called; then none is."""
    with place.db.write() as session:
        row = _led(session, place)
        _clear(row)
        live = {seat.worker_id: seat for seat, worker in _live(session, place) if not _is_closed(seat, worker)}
        missing = [member for member in members if member not in live]
        if missing:
            raise NotGathered(f"{_named(missing)} can't be called now.")
        round_id, first_rank, first_ranks = new_id("round"), 0, list[int]()
        in_order = [place.worker_id, *(member for member in members if member != place.worker_id)]
        for member in in_order:
            seat = live[member]
            seat.round_id, seat.first_rank, seat.joined_at, seat.ended = round_id, first_rank, None, None
            first_ranks.append(first_rank)
            first_rank += seat.num_processes
        row.round_id, row.task = round_id, {**task, "num_ranks": first_rank}
        row.expires_at = read_clock(session) + seconds
        return Round(round_id=round_id, num_ranks=first_rank, workers=in_order, first_ranks=first_ranks)


def join(place: GangMember, round_id: str) -> None:
    """The member has all that it needs. Raises NotGathered."""
    with place.db.write() as session:
        row, seat = _of_round(session, place, round_id)
        now = read_clock(session)
        if row.expires_at is not None and now >= row.expires_at:
            raise NotGathered(f"{_named([place.worker_id])} came too late.")
        seat.joined_at = now


def start(place: GangMember, round_id: str, *, port: int) -> None:
    """All have joined, and meet at this port of the leader's address. Raises NotGathered where one has not, is lost or
    has ended, or the time is over: then none starts."""
    with place.db.write() as session:
        row = _led(session, place)
        if row.round_id != round_id:
            raise _is_over()
        if (hindrance := hindrance_of(_progress(session, place, row))) is not None:
            raise NotGathered(hindrance)
        row.port, row.expires_at = port, None
        session.execute(update(GangSeat).where(GangSeat.round_id == round_id).values(num_missed=0, num_failed=0))


def progress(place: GangMember, round_id: str) -> RoundState:
    """For the leader. Raises NotGathered where the round is over, or another leads."""
    with place.db.read() as session:
        row = session.get_one(Gang, place.gang)
        if row.round_id != round_id or row.leader_id != place.worker_id:
            raise _is_over()
        return _progress(session, place, row)


def hindrance_of(found: RoundState) -> str | None:
    """Why the round can't start now; None where it can. Pure."""
    if found.ended:
        worker_id, end = min(found.ended.items())
        return f"{_named([worker_id])} could not take part: {end['detail']}"
    if found.lost:
        return f"{_named(found.lost)} was not heard from any more."
    if found.not_joined:
        return f"{_named(found.not_joined)} had not joined."
    if found.is_late:
        return "The gang took too long to begin."
    return "A worker of the gang is to leave." if found.is_anyone_leaving else None


def leave(place: GangMember, round_id: str, *, end: Json) -> bool:
    """The member's part of the round has ended: reason, detail, is_echo. False where the round is over anyway.

    One that could not take part for a reason of its own is cordoned at the third time since a round of it began.
    """
    with place.db.write() as session:
        try:
            row, seat = _of_round(session, place, round_id)
        except NotGathered:
            return False
        seat.ended = end
        if row.port is None and end["reason"] != EndReason.DRAINED:
            seat.num_missed += 1
            seat.num_failed += end["reason"] in cordons.AT_FAULT
            if seat.num_failed >= MAX_FAILED:
                seat.num_missed = seat.num_failed = 0
                cordons.close(session, place.worker_id, reason=OF_FAILED, evidence=[end])
        return True


def missed(place: GangMember, round_id: str, worker_ids: Collection[str]) -> None:
    """By the leader: the round came to nothing for the sake of these members. Others are called first next time."""
    with place.db.write() as session:
        if _led(session, place).round_id == round_id:
            theirs = (GangSeat.round_id == round_id, GangSeat.worker_id.in_(worker_ids))
            session.execute(update(GangSeat).where(*theirs).values(num_missed=GangSeat.num_missed + 1))


def ask_to_leave(place: GangMember) -> None:
    """The member is to leave: its leader saves the jobs first."""
    with place.db.write() as session:
        seat = session.get(GangSeat, place.worker_id, with_for_update=True)
        if seat is not None:
            seat.is_leaving = True


def end_round(place: GangMember, round_id: str) -> None:
    """Everybody is free. Nothing happens where the round is over already, or another leads."""
    with place.db.write() as session:
        row = _locked(session, place.gang)
        if row.round_id == round_id and row.leader_id == place.worker_id:
            _clear(row)


def _progress(session: Session, place: GangMember, row: Gang) -> RoundState:
    called = select(GangSeat).where(GangSeat.gang == row.name, GangSeat.round_id == row.round_id)
    live = {seat.worker_id for seat, _ in _live(session, place)}
    others = [seat for seat in session.scalars(called) if seat.worker_id != row.leader_id]
    return RoundState(
        num_others=len(others),
        not_joined=tuple(sorted(seat.worker_id for seat in others if seat.joined_at is None)),
        lost=tuple(sorted(seat.worker_id for seat in others if seat.worker_id not in live)),
        ended={seat.worker_id: seat.ended for seat in others if seat.ended is not None},
        is_anyone_leaving=any(seat.is_leaving for seat in others),
        is_late=row.expires_at is not None and read_clock(session) >= row.expires_at,
    )


def _locked(session: Session, gang: str) -> Gang:
    return session.get_one(Gang, gang, with_for_update=True, populate_existing=True)


def _led(session: Session, place: GangMember) -> Gang:
    row = _locked(session, place.gang)
    if row.leader_id != place.worker_id:
        raise NotGathered(f"The gang {row.name} is led by {row.leader_id} now.")
    return row


def _of_round(session: Session, place: GangMember, round_id: str) -> tuple[Gang, GangSeat]:
    row = _locked(session, place.gang)
    seat = session.get(GangSeat, place.worker_id, with_for_update=True, populate_existing=True)
    if seat is None or row.round_id != round_id or seat.round_id != round_id:
        raise _is_over()
    return row, seat


def _is_led(row: Gang, members: Sequence[LiveMember]) -> bool:
    leader = next((member for member in members if member.worker_id == row.leader_id), None)
    return leader is not None and (leader.is_open or row.round_id is not None)


def _clear(row: Gang) -> None:
    """Nobody is called any more. Seats keep how their parts ended until they are called again."""
    row.round_id = row.task = row.expires_at = row.port = None


def _live(session: Session, place: GangMember) -> Sequence[tuple[GangSeat, Worker]]:
    """The eldest first."""
    now = read_clock(session)
    heard = place.heard or LivenessTracker(silent_seconds=place.silent_seconds)
    of_gang = (GangSeat.gang == place.gang, Worker.ended_at.is_(None))
    found = select(GangSeat, Worker).join(Worker, Worker.id == GangSeat.worker_id).where(*of_gang)
    rows = session.execute(found.order_by(Worker.started_at, Worker.id))
    return [(seat, worker) for seat, worker in rows if heard.is_live(worker.id, worker.heartbeat_at, now=now)]


def _is_closed(seat: GangSeat, worker: Worker) -> bool:
    return worker.takes_nothing_new or seat.is_leaving


def _member(seat: GangSeat, worker: Worker) -> LiveMember:
    return LiveMember(
        worker_id=seat.worker_id,
        host=worker.host,
        kind=seat.kind,
        num_processes=seat.num_processes,
        free_bytes=seat.free_bytes,
        is_open=not _is_closed(seat, worker),
        versions=seat.versions,
        num_missed=seat.num_missed,
    )


def _call(row: Gang, seat: GangSeat | None) -> Call | None:
    """None where it is called to nothing, leads itself, or has had its part."""
    if seat is None or row.round_id is None or seat.round_id != row.round_id or row.leader_id == seat.worker_id:
        return None
    if seat.ended is not None:
        return None
    assert row.task is not None
    assert seat.first_rank is not None
    return Call(
        round_id=row.round_id,
        first_rank=seat.first_rank,
        task=row.task,
        has_joined=seat.joined_at is not None,
        port=row.port,
    )


def _named(worker_ids: Sequence[str]) -> str:
    return f"Worker {worker_ids[0]} of the gang" if len(worker_ids) == 1 else f"Workers {', '.join(worker_ids)}"


def _is_over() -> NotGathered:
    return NotGathered("That round of the gang is over.")


class LivenessTracker:
    """By one worker, of others. A heartbeat that is another one than before has just come, whatever time it bears."""

    def __init__(self, *, silent_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._latest: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}

    def is_live(self, worker_id: str, heartbeat_at: float, *, now: float) -> bool:
        """now: by the clock that the heartbeat bears. Where that was set, what was seen to beat still counts; of one
        that was not seen to beat yet, the time of its heartbeat."""
        before = self._latest.get(worker_id)
        self._latest[worker_id] = heartbeat_at
        if before is not None and before != heartbeat_at:
            self._moved_at[worker_id] = self._clock()
        moved_at = self._moved_at.get(worker_id)
        if moved_at is not None and self._clock() - moved_at < self._silent_seconds:
            return True
        return abs(now - heartbeat_at) < self._silent_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class GangView:
    name: str
    leader_id: str | None
    size: int
    min_size: int
    workers: tuple[str, ...]
    """Those that live and take something new, or train."""
    has_trainer: bool
    """Those that are there have begun."""

    @property
    def is_short(self) -> bool:
        return len(self.workers) < self.size


def gang_views(session: Session, *, now: float, silent_seconds: float = SILENT_SECONDS) -> list[GangView]:
    """Those of which anybody lives, by name."""
    live = (Worker.ended_at.is_(None), Worker.heartbeat_at > now - silent_seconds)
    found = select(Gang, GangSeat, Worker).join(GangSeat, GangSeat.gang == Gang.name)
    rows = session.execute(found.join(Worker, Worker.id == GangSeat.worker_id).where(*live).order_by(Worker.id)).all()
    there: dict[str, list[str]] = {row.Gang.name: [] for row in rows}
    for _, seat, worker in rows:
        if not (worker.takes_nothing_new or seat.is_leaving):
            there[seat.gang].append(worker.id)
    gangs = {row.Gang.name: row.Gang for row in rows}
    return [
        GangView(
            name=name,
            leader_id=gangs[name].leader_id,
            size=gangs[name].size,
            min_size=gangs[name].min_size,
            workers=tuple(there[name]),
            has_trainer=any(worker.trainer_id and worker.id == gangs[name].leader_id for _, _, worker in rows),
        )
        for name in sorted(gangs)
    ]


def lending_workers(found: Iterable[GangView]) -> set[str]:
    """Workers that claim nothing themselves: they lend their devices to another that lives."""
    return {worker for gang in found if gang.leader_id in gang.workers for worker in gang.workers} - {
        gang.leader_id for gang in found if gang.leader_id is not None
    }


def smallest_members(session: Session, *, now: float) -> dict[str, Worker]:
    """Of each worker of a gang that lives: whose memory decides what fits the gang. Of more than train together the
    smaller ones stand by, as far as may be known."""
    limits: dict[str, Worker] = {}
    for gang in gang_views(session, now=now):
        rows = session.scalars(select(Worker).where(Worker.id.in_(gang.workers))).all()
        largest_first = sorted(rows, key=lambda row: (row.memory_bytes, row.id), reverse=True)[: gang.size]
        limits |= {row.id: largest_first[-1] for row in rows}
    return limits


def gang_view_facts(found: Iterable[GangView]) -> list[Json]:
    return [asdict(gang) | {"workers": list(gang.workers)} for gang in found]


def why_all_wait(found: Sequence[GangView], open_ids: Collection[str]) -> str | None:
    """Why nothing begins, where every worker that takes jobs is of a gang that is not complete."""
    short = [gang for gang in found if gang.is_short and not gang.has_trainer]
    if not open_ids or not set(open_ids) <= {worker for gang in short for worker in gang.workers}:
        return None
    told = [_wait_sentence(gang) for gang in short]
    return f"It waits for others of a gang of workers. {' '.join(told)}"


def _wait_sentence(gang: GangView) -> str:
    num_there = len(gang.workers)
    told = f"Of {gang.name} {num_there} of the {gang.size} workers {'is' if num_there == 1 else 'are'} there"
    if num_there >= gang.min_size:
        return f"{told}; they begin without the others when these have been away for a while."
    return f"{told}."
