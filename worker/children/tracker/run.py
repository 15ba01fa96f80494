"""What every tracker's run can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Json = dict[str, Any]


class TrackerRun(Protocol):
    """An open run. What goes wrong is raised."""

    @property
    def run_id(self) -> str:
        """By which it is opened again."""
        ...

    def write(self, points: Sequence[Json]) -> None:
        """Points in the order of their steps: kind, step, at (seconds since 1970), values by name."""
        ...

    def end(self, ending: Json) -> None:
        """The job has ended: status, reason, adapter, lineage_id, error, numbers."""
        ...

    def close(self) -> None:
        """The job goes on later, perhaps elsewhere: keep what was written."""
        ...


def said(ending: Json) -> dict[str, str]:
    """What of an ending is text."""
    names = ("status", "reason", "adapter", "lineage_id", "error")
    return {name: str(ending[name]) for name in names if ending.get(name) is not None}
