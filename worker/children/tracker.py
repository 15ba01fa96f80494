"""A process that writes one run to a tracker. It reads requests as lines of JSON, and answers each with one line.

It has access to the tracker's library, but not to the database or the trainer. It exits when its standard input closes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

from catalog.processes import deny_inspection

Json = dict[str, Any]
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_CHARACTERS = 1000, 100, 5000
"""MLflow's limits of a request and of a text."""
MLFLOW_ENDS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
WANDB_PROJECT_CHARACTERS = 128
"""W&B's limit. Lorry's project names contain no space, so that names with the separator " - " are unambiguous."""


class TrackerRun(Protocol):
    @property
    def run_id(self) -> str:
        """The id with which the run can be opened again."""
        ...

    def write(self, points: Sequence[Json]) -> None: ...

    def end(self, ending: Json) -> None:
        """Write the end of the job (status, reason, adapter, lineage_id, error, numbers), and close the run."""
        ...

    def close(self) -> None:
        """Close the run and keep its points. The job continues later, perhaps on another worker."""
        ...


class MlflowRun:
    """Written with mlflow-skinny's client to a server or database that the operator has configured."""

    def __init__(self, opening: Json) -> None:
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
        texts = {key: one if isinstance(one, str) else json.dumps(one) for key, one in run["config"].items()}
        params = [self._entities.Param(key, text[:MLFLOW_CHARACTERS]) for key, text in texts.items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(made.info.run_id, params=params[start : start + MLFLOW_PARAMS])
        return made.info.run_id

    def write(self, points: Sequence[Json]) -> None:
        metrics = [
            self._entities.Metric(name, value, int(point["at"] * 1000), point["step"])
            for point in points
            for name, value in point["values"].items()
        ]
        for start in range(0, len(metrics), MLFLOW_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + MLFLOW_METRICS])

    def end(self, ending: Json) -> None:
        for name, value in _texts(ending).items():
            self._client.set_tag(self.run_id, f"lorry.{name}", value[:MLFLOW_CHARACTERS])
        for name, value in ending["numbers"].items():
            self._client.log_metric(self.run_id, name, value)
        self._client.set_terminated(self.run_id, MLFLOW_ENDS[ending["status"]])

    def close(self) -> None:
        """Leave the run in its state: it is running, or waits for its job."""


class TensorBoardRun:
    """A folder of event files, written with tensorboardX, which needs neither TensorFlow nor torch."""

    def __init__(self, opening: Json) -> None:
        absent: dict[str, Any] = {"torch": None}  # tensorboardX would import it, which takes seconds and half a GB
        sys.modules.update(absent)
        library: Any = import_module("tensorboardX")
        run, is_new = opening["run"], opening["run_id"] is None
        name = "-".join(part for part in (run["options"].get("name"), run["job_id"]) if part)
        self.run_id = f"{run['project']}/{name}"
        # Points that a process wrote but did not record before it died are written again: the newer file hides them.
        purge_step = None if is_new else opening["next_step"]
        folder = Path(opening["places"]["tensorboard"]) / self.run_id
        self._writer = library.SummaryWriter(str(folder), purge_step=purge_step)
        if is_new:
            self._writer.add_text("config", _table(run["config"]), 0)

    def write(self, points: Sequence[Json]) -> None:
        for point in points:
            for name, value in point["values"].items():
                self._writer.add_scalar(name, value, point["step"], walltime=point["at"])
        self._writer.flush()

    def end(self, ending: Json) -> None:
        self._writer.add_text("end", _table(_texts(ending)), 0)
        for name, value in ending["numbers"].items():
            self._writer.add_scalar(name.replace(".", "/"), value, 0)
        self.close()

    def close(self) -> None:
        self._writer.close()


class WandbRun:
    """A run whose id is the job's id, so that every attempt continues the same run.

    The operator sets the entity (WANDB_ENTITY, which wandb reads itself). A job can't set it.
    """

    def __init__(self, opening: Json) -> None:
        library: Any = import_module("wandb")
        run, options, folder = opening["run"], opening["run"]["options"], opening["places"]["wandb"]
        self.run_id: str = opening["run_id"] or run["job_id"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = library.init(
            project=f"{run['project']} - {options['project']}"[:WANDB_PROJECT_CHARACTERS],
            name=options.get("name") or run["job_id"],
            tags=options.get("tags"),
            id=self.run_id,
            resume="allow",
            dir=folder,
            config={**run["config"], "lorry": {"job_id": run["job_id"], "project": run["project"]}},
            settings=library.Settings(
                **dict.fromkeys(("silent", "disable_git", "disable_code", "x_disable_stats", "x_disable_meta"), True),
                console="off",
            ),
        )
        for kind in ("train", "valid"):  # an evaluation may follow later training steps: each curve has its own steps
            self._run.define_metric(f"{kind}/step", hidden=True)
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def write(self, points: Sequence[Json]) -> None:
        for point in points:
            self._run.log({f"{point['kind']}/step": point["step"], **point["values"]})

    def end(self, ending: Json) -> None:
        self._run.summary.update({f"lorry.{name}": value for name, value in _texts(ending).items()})
        self._run.summary.update(ending["numbers"])
        self._run.finish(exit_code=0 if ending["status"] == "succeeded" else 1)

    def close(self) -> None:
        self._run.finish(exit_code=0)


def _texts(ending: Json) -> dict[str, str]:
    return {name: str(value) for name, value in ending.items() if name != "numbers" and value is not None}


def _table(values: Json) -> str:
    """Return a Markdown table, which TensorBoard renders."""
    lines = [f"| {name} | {json.dumps(value).replace('|', '&#124;')} |" for name, value in values.items()]
    return "\n".join(("| | |", "|---|---|", *lines))


OPENERS: dict[str, Any] = {"mlflow": MlflowRun, "tensorboard": TensorBoardRun, "wandb": WandbRun}


def main() -> int:
    deny_inspection()  # its environment holds the tracker's credentials
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to standard output, which carries the answers
    try:
        _serve(sys.stdin, answers)
    except Exception as error:  # noqa: BLE001  (any error of a library is reported, and ends the process)
        _send(answers, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _serve(lines: TextIO, answers: TextIO) -> None:
    opening: Json = json.loads(next(lines))
    run: TrackerRun = OPENERS[opening["type"]](opening)
    _send(answers, {"run_id": run.run_id})
    for line in lines:
        request: Json = json.loads(line)
        run.write(request["points"])
        if request["end"] is not None:
            run.end(request["end"])
        _send(answers, {})
        if request["end"] is not None:
            return
    run.close()


def _send(answers: TextIO, answer: Json) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
