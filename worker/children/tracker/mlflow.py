"""A run of MLflow, written with mlflow-skinny's client to a server or database that the operator has configured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from worker.children.tracker.run import Json, text_fields

BATCH = 1000
"""Maximum number of metrics in one request to MLflow."""
PARAMS = 100
VALUE_CHARACTERS = 5000
ENDS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowRun:
    def __init__(self, opening: Json) -> None:
        """Open the run. Raises ImportError and errors of MLflow."""
        self._entities: Any = import_module("mlflow.entities")
        self._client: Any = import_module("mlflow").MlflowClient(tracking_uri=opening["places"]["mlflow"])
        self.run_id: str = opening["run_id"] or self._create(opening["run"])

    def _create(self, run: Json) -> str:
        options, job_id = run["options"], run["job_id"]
        name = f"{run['project']}/{options['experiment']}"
        experiment = self._client.get_experiment_by_name(name)
        ident = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        found = self._client.search_runs([ident], filter_string=f"tags.`lorry.job_id` = '{job_id}'", max_results=1)
        if found:  # created by an attempt that died before it reported the id
            return found[0].info.run_id
        tags: Json = {**(options.get("tags") or {}), "lorry.job_id": job_id, "lorry.project": run["project"]}
        made = self._client.create_run(ident, run_name=options.get("run_name") or job_id, tags=tags)
        params = [self._entities.Param(key, _text(value)) for key, value in run["config"].items()]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(made.info.run_id, params=params[start : start + PARAMS])
        return made.info.run_id

    def write(self, points: Sequence[Json]) -> None:
        metrics = [
            self._entities.Metric(name, value, int(point["at"] * 1000), point["step"])
            for point in points
            for name, value in point["values"].items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])

    def end(self, ending: Json) -> None:
        for name, value in text_fields(ending).items():
            self._client.set_tag(self.run_id, f"lorry.{name}", value[:VALUE_CHARACTERS])
        for name, value in ending["numbers"].items():
            self._client.log_metric(self.run_id, name, value)
        self._client.set_terminated(self.run_id, ENDS[ending["status"]])

    def close(self) -> None:
        """Leave the run in its state: it is running, or waits for its job."""


def _text(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:VALUE_CHARACTERS]
