"""Reads responses of the service. Unknown fields are kept in `raw`; missing fields have a default value.

An older client therefore works with a newer service, and the other way round. `lorry.models` has the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, cast, get_args, get_type_hints

FINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class View:
    """A JSON object of the API. Objects in its fields, and in lists there, are views if their type is one."""

    raw: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        views = _views(cls)
        values = {
            name: value if view is None else _viewed(view, value)
            for name, view in views.items()
            if (value := data.get(name)) is not None
        }
        return cls(**values, raw=dict(data))


@dataclass(frozen=True, kw_only=True)
class Finishing(View):
    """An object that has reached its end in some statuses."""

    status: str = ""

    @property
    def is_final(self) -> bool:
        """Whether its status is succeeded, failed or cancelled."""
        return self.status in FINAL_STATUSES


@cache
def _views(cls: type[View]) -> dict[str, type[View] | None]:
    """Return the class of the objects in each field; None for other fields."""
    hints = get_type_hints(cls)
    hints.pop("raw")
    return {
        name: next((part for part in (hint, *get_args(hint)) if _is_view(part)), None) for name, hint in hints.items()
    }


def _is_view(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, View)


def _viewed(view: type[View], value: object) -> Any:
    if isinstance(value, list):
        return [view.of(item) for item in cast("list[Mapping[str, Any]]", value)]
    return view.of(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else view()
