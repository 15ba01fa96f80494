"""A run of Trackio, in a database on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from worker.children.tracker.run import Json, text_fields


class TrackioRun:
    def __init__(self, opening: Json) -> None:
        """Open the run. Raises ImportError and errors of Trackio."""
        os.environ["TRACKIO_DIR"] = opening["places"]["trackio"]  # Trackio reads it when it is imported
        library: Any = import_module("trackio")
        run, options = opening["run"], opening["run"]["options"]
        self.run_id = "-".join(part for part in (options.get("name"), run["job_id"]) if part)
        self._run = library.init(
            project=f"{run['project']}-{options['project']}",
            name=self.run_id,
            config={**run["config"], "lorry_job_id": run["job_id"]},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )
        self._finish = library.finish

    def write(self, points: Sequence[Json]) -> None:
        for point in points:
            self._run.log(dict(point["values"]), step=point["step"])

    def end(self, ending: Json) -> None:
        self._run.log({**text_fields(ending), **ending["numbers"]})
        self.close()

    def close(self) -> None:
        self._finish()
