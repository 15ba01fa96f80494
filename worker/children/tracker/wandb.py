"""A run of Weights & Biases. Its id is the job's id, so every attempt continues the same run.

The operator sets the entity (WANDB_ENTITY, which wandb reads itself). A job can't set it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from worker.children.tracker.run import Json, text_fields

MAX_PROJECT_CHARS = 128
"""Limit of W&B. Lorry's project names contain no space, so that names with the separator " - " are unambiguous."""


class WandbRun:
    def __init__(self, opening: Json) -> None:
        """Open the run. Raises ImportError and errors of wandb."""
        library: Any = import_module("wandb")
        run, options = opening["run"], opening["run"]["options"]
        self.run_id: str = opening["run_id"] or run["job_id"]
        Path(opening["places"]["wandb"]).mkdir(parents=True, exist_ok=True)
        quiet = library.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run = library.init(
            project=f"{run['project']} - {options['project']}"[:MAX_PROJECT_CHARS],
            name=options.get("name") or run["job_id"],
            tags=options.get("tags"),
            id=self.run_id,
            resume="allow",
            dir=opening["places"]["wandb"],
            config={**run["config"], "lorry": {"job_id": run["job_id"], "project": run["project"]}},
            settings=quiet,
        )
        for kind in ("train", "valid"):  # an evaluation may follow later training steps: each curve has its own steps
            self._run.define_metric(f"{kind}/step", hidden=True)
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def write(self, points: Sequence[Json]) -> None:
        for point in points:
            self._run.log({f"{point['kind']}/step": point["step"], **point["values"]})

    def end(self, ending: Json) -> None:
        self._run.summary.update({f"lorry.{name}": value for name, value in text_fields(ending).items()})
        self._run.summary.update(ending["numbers"])
        self._run.finish(exit_code=0 if ending["status"] == "succeeded" else 1)

    def close(self) -> None:
        self._run.finish(exit_code=0)
