"""The schema of a page of a list."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item", bound=BaseModel)


class ListPage(BaseModel, Generic[Item]):
    model_config = ConfigDict(
        json_schema_extra={
            "description": "A page of a list. To get the next page, pass the ID of the last item as `after`."
        }
    )
    object: Literal["list"] = "list"
    data: list[Item] = Field(description="Items of this page.")
    has_more: bool = Field(default=False, description="Whether there are more items after this page.")
    first_id: str | None = Field(default=None, description="ID of the first item; null if the page is empty.")
    last_id: str | None = Field(default=None, description="ID of the last item; null if the page is empty.")


def page_of(items: list[Item], *, has_more: bool = False) -> ListPage[Item]:
    """Return a page of items that each have an `id`."""
    ids = [str(getattr(item, "id", "")) or None for item in items]
    return ListPage[Item](
        data=items, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None
    )
