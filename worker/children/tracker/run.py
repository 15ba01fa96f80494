"""The interface of every tracker's run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Json = dict[str, Any]


class TrackerRun(Protocol):
    """An open run. Its methods may raise any error of the tracker's library."""

    @property
    def run_id(self) -> str:
        """The id with which the run can be opened again."""
        ...

    def write(self, points: Sequence[Json]) -> None:
        """Write points in the order of their steps: kind, step, at (seconds since 1970), values by name."""
        ...

    def end(self, ending: Json) -> None:
        """Write the end of the job: status, reason, adapter, lineage_id, error, numbers."""
        ...

    def close(self) -> None:
        """Close the run and keep its points. The job continues later, perhaps on another worker."""
        ...


def text_fields(ending: Json) -> dict[str, str]:
    """Return the text fields of an ending."""
    names = ("status", "reason", "adapter", "lineage_id", "error")
    return {name: str(ending[name]) for name in names if ending.get(name) is not None}
