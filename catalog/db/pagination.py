"""Keyset pagination on (created_at, id). Without OFFSET, every page costs the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Select, literal, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from catalog.errors import InvalidRequest

T = TypeVar("T")
Order = Literal["asc", "desc"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[T]):
    """One page of a list, and whether more rows follow."""

    items: list[T]
    has_more: bool


def paginate(
    session: Session,
    scope: Select[T],
    *,
    created: InstrumentedAttribute[float],
    ident: InstrumentedAttribute[str],
    after: str | None,
    limit: int,
    order: Order = "desc",
    visible: tuple[ColumnElement[bool], ...] = (),
) -> Page[T]:
    """Return the page of `scope` that follows the row `after`.

    The items are the rows of `scope` that are also `visible`. The cursor may be any row of `scope`: a row that was
    deleted since the last page still marks its end.
    """
    statement = scope.where(*visible)
    if after is not None:
        statement = statement.where(_beyond(session, scope, created=created, ident=ident, after=after, order=order))
    keys: tuple[Any, Any] = (created.desc(), ident.desc()) if order == "desc" else (created.asc(), ident.asc())
    rows = list(session.scalars(statement.order_by(*keys).limit(limit + 1)))
    return Page(items=rows[:limit], has_more=len(rows) > limit)


def unknown_cursor(after: str) -> InvalidRequest:
    return InvalidRequest("unknown_cursor", after=after, param="after")


def _beyond(
    session: Session,
    scope: Select[Any],
    *,
    created: InstrumentedAttribute[float],
    ident: InstrumentedAttribute[str],
    after: str,
    order: Order,
) -> ColumnElement[bool]:
    cursor = session.execute(scope.with_only_columns(created, ident).where(ident == after)).first()
    if cursor is None:
        raise unknown_cursor(after)
    at, row_id = cursor
    place, last = tuple_(created, ident), tuple_(literal(at), literal(row_id))
    return place < last if order == "desc" else place > last
