"""The base class of all tables: names of constraints, storage types, ids and lease columns."""

from __future__ import annotations

import re
import secrets
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, Integer, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
Json = dict[str, Any]
AutoKey = BigInteger().with_variant(Integer, "sqlite")
"""Primary key that the database numbers. SQLite does that only for a column of type INTEGER."""


ANY_ID = re.compile(r"(?<![A-Za-z0-9])[a-z]+(?:-[a-z]+)*-[0-9a-f]{24}(?![0-9A-Za-z])")
"""Matches each id that `new_id` makes, with any prefix, in a longer text."""


def new_id(prefix: str) -> str:
    """Return an unguessable id such as `ftjob-3f0a…`: the prefix and 96 random bits in hex."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, float: Float(53), int: BigInteger, str: String(255)}


class Leased:
    """Lease columns of a row that only one process at a time may work on; see catalog/db/lease.py."""

    claim_id: Mapped[str | None] = mapped_column(unique=True)
    """The fencing token. A write that does not name it changes nothing."""
    lease_expires_at: Mapped[float | None]
