"""Gangs: workers of several nodes that train as one device group, and who sits in which."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Integer
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table


class Gang(Table):
    """One row for each name, with the round that its members train in; see catalog/fleet/gangs.py."""

    __tablename__ = "gangs"
    name: Mapped[str] = mapped_column(primary_key=True)
    leader_id: Mapped[str | None]
    """The worker that claims jobs for all of them."""
    size: Mapped[int] = mapped_column(Integer)
    min_size: Mapped[int] = mapped_column(Integer)
    """With fewer members it trains nothing. Both as the member that entered last was told."""
    round_id: Mapped[str | None]
    """None: nobody is called."""
    task: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """What the members of the round load, and where they meet."""
    expires_at: Mapped[float | None]
    """By then the round has started, or it is over."""
    port: Mapped[int | None] = mapped_column(Integer)
    """Where the leader's trainer listens. None: the round gathers."""


class GangSeat(Table):
    """A worker that lends its devices to whoever leads its gang. Whether it lives is on its worker's row."""

    __tablename__ = "gang_seats"
    worker_id: Mapped[str] = mapped_column(primary_key=True)
    gang: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    """cpu or cuda. Those of one round are alike."""
    num_processes: Mapped[int] = mapped_column(Integer)
    """Of a trainer on it."""
    versions: Mapped[str]
    """Of what decides a result. Those of one round have the same."""
    free_bytes: Mapped[int]
    """Memory that each of them could take when it last looked."""
    round_id: Mapped[str | None]
    """The round that it is called to, or was last."""
    first_rank: Mapped[int | None] = mapped_column(Integer)
    """In that round: the number of the first of its processes."""
    joined_at: Mapped[float | None]
    """It has what the round needs."""
    is_leaving: Mapped[bool] = mapped_column(Boolean)
    """It is to leave, and waits until the jobs are saved."""
    num_missed: Mapped[int] = mapped_column(Integer)
    """Rounds in a row that did not begin for its sake: it was late, or could not take part."""
    num_failed: Mapped[int] = mapped_column(Integer, server_default="0")
    """Of those, the ones in which it could not take part for a reason of its own."""
    ended: Mapped[Json | None] = mapped_column(JSON(none_as_null=True))
    """How its part of that round ended: reason, detail, and whether it only followed from another's end."""
