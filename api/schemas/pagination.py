"""The schema of a page of a list."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, Field

Item = TypeVar("Item", bound=BaseModel)


class ListPage(BaseModel, Generic[Item]):
    """A page of a list. To get the next page, pass the id of the last item as `after`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = Field(default=False, description="Whether there are more items after this page.")
    first_id: str | None = None
    last_id: str | None = None


def page_of(items: list[Item], *, has_more: bool = False) -> ListPage[Item]:
    """Return a page of items that each have an `id`."""
    ids = [str(getattr(item, "id", "")) or None for item in items]
    return ListPage[Item](
        data=items, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None
    )
