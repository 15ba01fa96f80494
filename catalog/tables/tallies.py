"""Numbers of the whole fleet that are kept as they change, so that nobody has to count."""

from __future__ import annotations

from sqlalchemy import Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Table


class Tally(Table):
    """One number; its rows together. See catalog/usage/counters.py."""

    __tablename__ = "tallies"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    """What is counted of that name, such as an `EndReason`; empty where there is one number only."""
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Of those who add to it: so that they don't wait for each other."""
    number: Mapped[int]
