"""A folder of TensorBoard event files, written with tensorboardX, which needs neither TensorFlow nor torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from worker.children.tracker.run import Json, text_fields


class TensorBoardRun:
    def __init__(self, opening: Json) -> None:
        """Open the run. Raises ImportError, OSError."""
        absent: dict[str, Any] = {"torch": None}  # tensorboardX would import it, which takes seconds and half a GB
        sys.modules.update(absent)
        library: Any = import_module("tensorboardX")
        run = opening["run"]
        name = "-".join(part for part in (run["options"].get("name"), run["job_id"]) if part)
        folder = Path(opening["places"]["tensorboard"]) / run["project"] / name
        is_new = opening["run_id"] is None
        # Points that a process wrote but did not record before it died are written again: the newer file hides them.
        purge_step = None if is_new else opening["next_step"]
        self.run_id = f"{run['project']}/{name}"
        self._writer = library.SummaryWriter(str(folder), purge_step=purge_step)
        if is_new:
            self._writer.add_text("config", _table(run["config"]), 0)

    def write(self, points: Sequence[Json]) -> None:
        for point in points:
            for name, value in point["values"].items():
                self._writer.add_scalar(name, value, point["step"], walltime=point["at"])
        self._writer.flush()

    def end(self, ending: Json) -> None:
        self._writer.add_text("end", _table(text_fields(ending)), 0)
        for name, value in ending["numbers"].items():
            self._writer.add_scalar(name.replace(".", "/"), value, 0)
        self.close()

    def close(self) -> None:
        self._writer.close()


def _table(values: Json) -> str:
    """Return a Markdown table, which TensorBoard renders."""
    lines = [f"| {name} | {json.dumps(value).replace('|', '&#124;')} |" for name, value in values.items()]
    return "\n".join(("| | |", "|---|---|", *lines))
