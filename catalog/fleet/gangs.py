"""Gangs: workers on several nodes that train as one. One member leads and claims jobs; the others provide devices.

A round is one trainer across several members. The leader opens it, each member joins, and it starts once all have
joined; if one can't, none starts. It ends for all members at the same time. Every operation locks the gang's row first
and passes the id of its round; an outdated id raises NotGathered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from catalog.clock import boot_seconds
from catalog.db.database import Database, add_if_missing, read_clock
from catalog.errors import Conflict
from catalog.fleet import cordons
from catalog.states import EndReason
from catalog.tables.fleet import SILENT_SECONDS, Gang, GangSeat, Worker
from catalog.tables.table import Json, new_id

MAX_FAILED = 3
"""A member is cordoned after this many rounds that it failed to join through its own fault, with no started round in
between."""
OF_FAILED = f"It failed to join its gang's trainer {MAX_FAILED} times in a row."


class NotGathered(Conflict):
    """A round lacks one of its members, or has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GangMember:
    """The calling worker, as a member of its gang."""

    db: Database
    worker_id: str
    gang: str
    silent_seconds: float
    """A worker without a heartbeat for this long is not live."""
    heard: LivenessTracker | None = None
    """Set by members that poll: with it, a change of the database's clock does not make live workers appear lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveMember:
    """A live worker of the gang."""

    worker_id: str
    host: str
    kind: str
    num_processes: int
    free_bytes: int
    is_open: bool
    """The worker is neither cordoned nor draining."""
    versions: str = ""
    num_missed: int = 0
    """Missed rounds since the last started one; see GangSeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The round that a member is called to, and its part in it."""

    round_id: str
    first_rank: int
    task: Json
    has_joined: bool
    port: int | None
    """Port of the leader's trainer; None before the round has started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GangState:
    """A gang as one of its members sees it."""

    leader_id: str | None
    """None if there is no live leader."""
    members: tuple[LiveMember, ...]
    """Live members, the longest-running first."""
    call: Call | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """A round that its leader has opened."""

    round_id: str
    num_ranks: int
    """Total number of processes on all members."""
    workers: list[str]
    first_ranks: list[int]
    """Rank of the first process of each worker."""

    def worker_of(self, rank: int) -> str:
        return self.workers[bisect_right(self.first_ranks, rank) - 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundState:
    """The progress of a round, for its leader."""

    num_others: int
    """Number of members without the leader."""
    not_joined: tuple[str, ...]
    lost: tuple[str, ...]
    """Members that have stopped, or have missed heartbeats for too long."""
    ended: dict[str, Json]
    """Results of members whose part has ended, by worker; see GangSeat."""
    leaving: tuple[str, ...]
    """Members that are draining."""
    is_late: bool
    """The time limit for joining has passed."""

    @property
    def is_anyone_leaving(self) -> bool:
        return bool(self.leaving)


def enter(
    member: GangMember, *, size: int, min_size: int, kind: str, num_processes: int, free_bytes: int, versions: str = ""
) -> None:
    """Add a registered worker to its gang, and delete the seats of stopped workers."""
    with member.db.write() as session:
        add_if_missing(session, Gang, {"name": member.gang, "size": size, "min_size": min_size})
        row = _locked(session, member.gang)
        row.size, row.min_size = size, min_size
        gone = select(Worker.id).where(Worker.ended_at.is_not(None))
        session.execute(delete(GangSeat).where(GangSeat.gang == member.gang, GangSeat.worker_id.in_(gone)))
        seat = session.get(GangSeat, member.worker_id) or GangSeat(worker_id=member.worker_id)
        seat.gang, seat.kind, seat.num_processes, seat.free_bytes = member.gang, kind, num_processes, free_bytes
        seat.versions, seat.round_id, seat.is_leaving = versions, None, False
        seat.num_missed = seat.num_failed = 0
        session.add(seat)


def report_memory(member: GangMember, *, free_bytes: int) -> None:
    """Report the memory that each process of a trainer could use on this member now."""
    with member.db.write() as session:
        seat = session.get(GangSeat, member.worker_id, with_for_update=True)
        if seat is not None:
            seat.free_bytes = free_bytes


def standing(member: GangMember) -> GangState:
    """Return the gang's current state for this member."""
    with member.db.read() as session:
        row = session.get_one(Gang, member.gang)
        members = tuple(_member(seat, worker) for seat, worker in _live(session, member))
        call = _call(row, session.get(GangSeat, member.worker_id))
        return GangState(leader_id=row.leader_id if _is_led(row, members) else None, members=members, call=call)


def lead(member: GangMember) -> bool:
    """Try to become the leader. Returns whether this member leads.

    It succeeds if there is no live leader, or if the leader is cordoned or draining and has no open round. A round of
    the previous leader ends.
    """
    with member.db.write() as session:
        row = _locked(session, member.gang)
        members = [_member(seat, worker) for seat, worker in _live(session, member)]
        is_able = any(each.worker_id == member.worker_id and each.is_open for each in members)
        if is_able and not _is_led(row, members):
            _clear(row)
            row.leader_id = member.worker_id
        return row.leader_id == member.worker_id


def open_round(member: GangMember, *, members: Sequence[str], task: Json, seconds: float) -> Round:
    """Open a round with these members, which include the leader. An earlier round of the leader ends.

    seconds: time limit for all members to join. Raises NotGathered if a member is not available; then none is called.
    """
    with member.db.write() as session:
        row = _led(session, member)
        _clear(row)
        live = {seat.worker_id: seat for seat, worker in _live(session, member) if not _is_closed(seat, worker)}
        missing = [worker_id for worker_id in members if worker_id not in live]
        if missing:
            raise NotGathered("gang_members_unavailable", gang=member.gang, missing=_named(missing))
        round_id, first_rank, first_ranks = new_id("round"), 0, list[int]()
        in_order = [member.worker_id, *(worker_id for worker_id in members if worker_id != member.worker_id)]
        for worker_id in in_order:
            seat = live[worker_id]
            seat.round_id, seat.first_rank, seat.joined_at, seat.ended = round_id, first_rank, None, None
            first_ranks.append(first_rank)
            first_rank += seat.num_processes
        row.round_id, row.task = round_id, {**task, "num_ranks": first_rank}
        row.expires_at = read_clock(session) + seconds
        return Round(round_id=round_id, num_ranks=first_rank, workers=in_order, first_ranks=first_ranks)


def join(member: GangMember, round_id: str) -> None:
    """Join the round: the member has everything that it needs to start. Raises NotGathered."""
    with member.db.write() as session:
        row, seat = _of_round(session, member, round_id)
        now = read_clock(session)
        if row.expires_at is not None and now >= row.expires_at:
            late = now - row.expires_at
            raise NotGathered("gang_joined_late", name=row.name, worker_id=member.worker_id, late=late)
        seat.joined_at = now


def start(member: GangMember, round_id: str, *, port: int) -> None:
    """Start the round: all members connect to this port of the leader's address.

    Raises NotGathered if a member has not joined, is lost or has ended its part, or if the time limit has passed. Then
    no member starts.
    """
    with member.db.write() as session:
        row = _led(session, member)
        if row.round_id != round_id:
            raise _is_over(member.gang, round_id)
        found = _progress(session, member, row)
        if (hindrance := hindrance_of(found)) is not None:
            raise hindered(row.name, hindrance, found)
        row.port, row.expires_at = port, None
        session.execute(update(GangSeat).where(GangSeat.round_id == round_id).values(num_missed=0, num_failed=0))


def progress(member: GangMember, round_id: str) -> RoundState:
    """Return the round's progress for its leader. Raises NotGathered if the round has ended or another member leads."""
    with member.db.read() as session:
        row = session.get_one(Gang, member.gang)
        if row.leader_id != member.worker_id:
            raise _is_led_by_another(row)
        if row.round_id != round_id:
            raise _is_over(member.gang, round_id)
        return _progress(session, member, row)


def hindrance_of(found: RoundState) -> str | None:
    """Return the reason why the round can't start now; None if it can. Pure."""
    if found.ended:
        worker_id, end = min(found.ended.items())
        return f"{_named([worker_id])} could not participate: {end['detail']}"
    if found.lost:
        return f"{_named(found.lost)} stopped sending heartbeats."
    if found.not_joined:
        return f"{_named(found.not_joined)} did not join in time."
    if found.is_late:
        return "the trainer did not start in time."
    if found.leaving:
        return f"{_named(found.leaving)} {'is' if len(found.leaving) == 1 else 'are'} draining."
    return None


def hindered(gang: str, hindrance: str, found: RoundState) -> NotGathered:
    """Return the error of a round that can't start for the reason `hindrance_of`."""
    is_slow = not found.ended and not found.lost and found.is_late
    return NotGathered("gang_too_slow" if is_slow else "gang_incomplete", gang=gang, hindrance=hindrance)


def leave(member: GangMember, round_id: str, *, end: Json) -> bool:
    """Report the end of the member's part in the round. Returns False if the round has already ended.

    end: reason, detail and is_echo. A member that fails to participate MAX_FAILED times through its own fault, with no
    started round in between, is cordoned.
    """
    with member.db.write() as session:
        try:
            row, seat = _of_round(session, member, round_id)
        except NotGathered:
            return False
        seat.ended = end
        if row.port is None and end["reason"] != EndReason.DRAINED:
            seat.num_missed += 1
            seat.num_failed += end["reason"] in cordons.AT_FAULT
            if seat.num_failed >= MAX_FAILED:
                seat.num_missed = seat.num_failed = 0
                cordons.close(session, member.worker_id, reason=OF_FAILED, evidence=[end])
        return True


def missed(member: GangMember, round_id: str, worker_ids: Collection[str]) -> None:
    """Record, as the leader, that the round failed because of these members. Other members are preferred next time."""
    with member.db.write() as session:
        if _led(session, member).round_id == round_id:
            seats = (GangSeat.round_id == round_id, GangSeat.worker_id.in_(worker_ids))
            session.execute(update(GangSeat).where(*seats).values(num_missed=GangSeat.num_missed + 1))


def ask_to_leave(member: GangMember) -> None:
    """Announce that the member is draining. Its leader saves the jobs first."""
    with member.db.write() as session:
        seat = session.get(GangSeat, member.worker_id, with_for_update=True)
        if seat is not None:
            seat.is_leaving = True


def end_round(member: GangMember, round_id: str) -> None:
    """End the round for all members. Does nothing if it has already ended, or if another member leads."""
    with member.db.write() as session:
        row = _locked(session, member.gang)
        if row.round_id == round_id and row.leader_id == member.worker_id:
            _clear(row)


def _progress(session: Session, member: GangMember, row: Gang) -> RoundState:
    called = select(GangSeat).where(GangSeat.gang == row.name, GangSeat.round_id == row.round_id)
    live = {seat.worker_id for seat, _ in _live(session, member)}
    others = [seat for seat in session.scalars(called) if seat.worker_id != row.leader_id]
    return RoundState(
        num_others=len(others),
        not_joined=tuple(sorted(seat.worker_id for seat in others if seat.joined_at is None)),
        lost=tuple(sorted(seat.worker_id for seat in others if seat.worker_id not in live)),
        ended={seat.worker_id: seat.ended for seat in others if seat.ended is not None},
        leaving=tuple(sorted(seat.worker_id for seat in others if seat.is_leaving)),
        is_late=row.expires_at is not None and read_clock(session) >= row.expires_at,
    )


def _locked(session: Session, gang: str) -> Gang:
    return session.get_one(Gang, gang, with_for_update=True, populate_existing=True)


def _led(session: Session, member: GangMember) -> Gang:
    row = _locked(session, member.gang)
    if row.leader_id != member.worker_id:
        raise _is_led_by_another(row)
    return row


def _of_round(session: Session, member: GangMember, round_id: str) -> tuple[Gang, GangSeat]:
    row = _locked(session, member.gang)
    seat = session.get(GangSeat, member.worker_id, with_for_update=True, populate_existing=True)
    if seat is None or row.round_id != round_id or seat.round_id != round_id:
        raise _is_over(member.gang, round_id)
    return row, seat


def _is_led(row: Gang, members: Sequence[LiveMember]) -> bool:
    leader = next((member for member in members if member.worker_id == row.leader_id), None)
    return leader is not None and (leader.is_open or row.round_id is not None)


def _clear(row: Gang) -> None:
    """End the round. Seats keep the results of their parts until they are called again."""
    row.round_id = row.task = row.expires_at = row.port = None


def _live(session: Session, member: GangMember) -> Sequence[tuple[GangSeat, Worker]]:
    """Return the live members of the gang, the longest-running first."""
    now = read_clock(session)
    liveness = member.heard or LivenessTracker(silent_seconds=member.silent_seconds)
    of_gang = (GangSeat.gang == member.gang, Worker.ended_at.is_(None))
    found = select(GangSeat, Worker).join(Worker, Worker.id == GangSeat.worker_id).where(*of_gang)
    rows = session.execute(found.order_by(Worker.started_at, Worker.id))
    return [(seat, worker) for seat, worker in rows if liveness.is_live(worker.id, worker.heartbeat_at, now=now)]


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
    """Return the call to this member; None if it has no call, leads the round, or has ended its part."""
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
    return f"worker {worker_ids[0]}" if len(worker_ids) == 1 else f"workers {', '.join(worker_ids)}"


def _is_over(gang: str, round_id: str) -> NotGathered:
    return NotGathered("gang_round_over", gang=gang, round_id=round_id)


def _is_led_by_another(row: Gang) -> NotGathered:
    if row.leader_id is None:
        return NotGathered("gang_without_leader", name=row.name)
    return NotGathered("gang_led_by_another", name=row.name, leader_id=row.leader_id)


class LivenessTracker:
    """Tracks which other workers are live. A heartbeat that has changed counts as recent, whatever its timestamp is."""

    def __init__(self, *, silent_seconds: float, clock: Callable[[], float] = boot_seconds) -> None:
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._latest: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}

    def is_live(self, worker_id: str, heartbeat_at: float, *, now: float) -> bool:
        """Return whether the worker is live. now: time of the clock that also provides `heartbeat_at`.

        An observed change of the heartbeat counts even if that clock was set. Before the first observed change, the
        timestamp decides.
        """
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
    """Live members that are neither cordoned nor draining."""
    has_trainer: bool
    """The leader has a trainer."""

    @property
    def is_short(self) -> bool:
        return len(self.workers) < self.size


def gang_views(session: Session, *, now: float, silent_seconds: float = SILENT_SECONDS) -> list[GangView]:
    """Return the gangs that have live members, sorted by name."""
    live = (Worker.ended_at.is_(None), Worker.heartbeat_at > now - silent_seconds)
    found = select(Gang, GangSeat, Worker).join(GangSeat, GangSeat.gang == Gang.name)
    rows = session.execute(found.join(Worker, Worker.id == GangSeat.worker_id).where(*live).order_by(Worker.id)).all()
    available: dict[str, list[str]] = {row.Gang.name: [] for row in rows}
    for _, seat, worker in rows:
        if not (worker.takes_nothing_new or seat.is_leaving):
            available[seat.gang].append(worker.id)
    gangs = {row.Gang.name: row.Gang for row in rows}
    return [
        GangView(
            name=name,
            leader_id=gangs[name].leader_id,
            size=gangs[name].size,
            min_size=gangs[name].min_size,
            workers=tuple(available[name]),
            has_trainer=any(worker.trainer_id and worker.id == gangs[name].leader_id for _, _, worker in rows),
        )
        for name in sorted(gangs)
    ]


def lending_workers(found: Iterable[GangView]) -> set[str]:
    """Return the workers that claim no jobs themselves, because they provide devices to a live leader."""
    return {worker for gang in found if gang.leader_id in gang.workers for worker in gang.workers} - {
        gang.leader_id for gang in found if gang.leader_id is not None
    }


def smallest_members(session: Session, *, now: float) -> dict[str, Worker]:
    """Return, for each live gang member, the worker whose memory limits the gang.

    If the gang has more workers than train together, the smaller ones are assumed not to train.
    """
    limits: dict[str, Worker] = {}
    for gang in gang_views(session, now=now):
        rows = session.scalars(select(Worker).where(Worker.id.in_(gang.workers))).all()
        largest_first = sorted(rows, key=lambda row: (row.memory_bytes, row.id), reverse=True)[: gang.size]
        limits |= {row.id: largest_first[-1] for row in rows}
    return limits


def gang_view_facts(found: Iterable[GangView]) -> list[Json]:
    return [asdict(gang) | {"workers": list(gang.workers)} for gang in found]


def why_all_wait(found: Sequence[GangView], open_ids: Collection[str]) -> str | None:
    """Return the reason why no job starts if every available worker belongs to an incomplete gang; None otherwise."""
    short = [gang for gang in found if gang.is_short and not gang.has_trainer]
    if not open_ids or not set(open_ids) <= {worker for gang in short for worker in gang.workers}:
        return None
    sentences = [_wait_sentence(gang) for gang in short]
    return f"It waits for missing workers of a gang (workers that train together). {' '.join(sentences)}"


def _wait_sentence(gang: GangView) -> str:
    num_available = len(gang.workers)
    sentence = (
        f"{num_available} of {gang.size} workers of {gang.name} {'is' if num_available == 1 else 'are'} available"
    )
    if num_available >= gang.min_size:
        return f"{sentence}; after a waiting time, training starts without the others."
    return f"{sentence}."
