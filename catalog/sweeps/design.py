"""The design of a sweep: the job request of each trial. Contains all checks that need no database.

The complete requests of the trials are checked before any job exists, so that no trial fails because of a value of the
sweep.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from catalog.errors import InvalidRequest
from catalog.spec import evaluation_schedule
from catalog.spec.job import JobRequest, resolve
from catalog.spec.model_fields import fields_of, value_at, with_values
from catalog.spec.sweep import FIXED, MAX_TRIALS, VARIABLE, Metric, Parameter, Search, SweepRequest
from catalog.spec.validation_messages import Problem, by_field, expectation, field_path, value_text
from catalog.sweeps.study import PastTrial, grid, grid_values, kind_of, suggest

EVERY_STEPS = "evaluation.every_steps"
USUAL_FACTOR = 3
USUAL_RUNGS = 3
"""Default number of rungs before the last step of the shortest trial, for a sweep without min_steps."""
OTHER_NAMES = {"lr": "learning_rate", "epochs": "n_epochs", "r": "rank", "target": "target_modules"}
"""Common other names of fields, and the last part of the field's path."""
ALIKE = 0.7
MAX_SHOWN = 80
"""Maximum number of characters of an unknown path in a message."""
MAX_TEXT = 160
GROUP_WANTED = frozenset({"dict_type", "model_type", "model_attributes_type"})
"""pydantic's error types for a value in place of an object."""
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Everything that determines the trials of a sweep."""

    template: Json
    """The fields that all trials share, as the body of a job."""
    parameters: Mapping[str, Parameter]
    search: Search
    metric: Metric
    seed: int
    num_trials: int
    rungs: Json | None = None
    """min_steps and reduction_factor; None: no trial is stopped."""

    def parameters_of(self, numbers: Sequence[int], past: Sequence[PastTrial] = ()) -> list[Json]:
        """Return the parameters of the trials with these numbers. past: see `suggest`."""
        if self.search.type == "grid":
            combinations = grid(self.parameters)
            return [combinations[number] for number in numbers]
        return suggest(self.parameters, numbers, method=self.search.type, seed=self.seed, past=past)

    def request_of(self, parameters: Mapping[str, Any]) -> JobRequest:
        """Return the job request of a trial with these parameters. Raises InvalidRequest with the invalid field."""
        body = with_values({"seed": self.seed, **self.template}, parameters)
        is_free = value_at(body, EVERY_STEPS) in (None, "auto")
        if self.rungs is not None and self.metric.startswith("valid") and is_free:
            body = with_values(body, {EVERY_STEPS: self.rungs["min_steps"]})
        try:
            return JobRequest.model_validate(body)
        except ValidationError as error:
            raise _refused(error, body, parameters) from error


def designed(request: SweepRequest, *, seed: int) -> Design:
    """Return the design without its rungs, which depend on the length of the data; see `rungs`. Raises InvalidRequest.

    `seed`: used if the request sets none.
    """
    for path, parameter in request.parameters.items():
        _check_path(path)
        _check_range(path, parameter, request.search)
    for path in request.parameters:
        outer = next((other for other in request.parameters if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise InvalidRequest(
                f"Parameter {outer!r} includes parameter {path!r}, so a sweep can't vary both.",
                code="overlapping_parameters",
                remedy=f"Remove {outer!r} or {path!r} from 'parameters'.",
                param=f"parameters.{path}",
            )
    _check_objective(request)
    return Design(
        template=request.template(),
        parameters=request.parameters,
        search=request.search,
        metric=request.objective.metric,
        seed=seed if request.search.seed is None else request.search.seed,
        num_trials=request.search.trials or _grid_size(request.parameters),
    )


def checked(design: Design) -> list[JobRequest]:
    """Return the requests of all trials, after a check of the limits of each range. Raises InvalidRequest.

    For tpe, which chooses later, the requests have random parameters instead.
    """
    ends: dict[str, list[Any]] = {
        path: parameter.values or [int(end) if kind_of(path) == "integer" else end for end in _range(parameter)]
        for path, parameter in design.parameters.items()
    }
    first = {path: values[0] for path, values in ends.items()}
    for path, values in ends.items():
        is_tried_below = design.parameters[path].values is not None and design.search.type != "tpe"
        for value in () if is_tried_below else values:
            design.request_of({**first, path: value})
    return [design.request_of(parameters) for parameters in design.parameters_of(range(design.num_trials))]


def rungs(design: Design, requests: Sequence[JobRequest], *, num_rows: int) -> Json:
    """Return the rungs of a sweep with a pruner, for a training file of `num_rows`. The first one is at an evaluation.

    Raises InvalidRequest if the first rung is not before the last step of the shortest trial.
    """
    search, factor = design.search, design.search.reduction_factor or USUAL_FACTOR
    specs = [resolve(request, num_rows=num_rows, max_positions=None, seed=0) for request in requests]
    known = [steps for spec in specs if (steps := evaluation_schedule.most_steps(spec, num_rows)) is not None]
    fewest = min(known, default=None)
    if search.min_steps is None and fewest is None:
        raise InvalidRequest(
            "search.min_steps is required: data.overflow is 'split', so the number of steps in each trial is unknown "
            "until the training texts have been split.",
            code="min_steps_required",
            remedy="Set search.min_steps, or set max_steps for all trials.",
            param="search.min_steps",
        )
    interval = value_at(design.template, EVERY_STEPS) if design.metric.startswith("valid") else None
    every = interval if isinstance(interval, int) else 1
    wanted = search.min_steps or max(1, (fewest or 1) // factor**USUAL_RUNGS)
    first = math.ceil(wanted / every) * every
    if fewest is not None and first >= fewest:
        raise InvalidRequest(
            f"The first rung is at step {first}, but the shortest trial ends at step {fewest}, so that "
            "trial can't be stopped early.",
            code="no_rung_in_time",
            remedy=f"Set search.min_steps and {EVERY_STEPS} to less than {fewest}, train for more steps (max_steps or "
            "n_epochs), or search without the pruner asha.",
            param="search.min_steps" if search.min_steps is not None else "search",
        )
    return {"min_steps": first, "reduction_factor": factor}


def _check_path(path: str) -> None:
    """Raises InvalidRequest if no job field has the path, or if all trials must share the field."""
    if path in VARIABLE:
        return
    shown = path[:MAX_SHOWN]
    param, reason = f"parameters.{shown}", FIXED.get(path.split(".", 1)[0])
    if reason is not None:
        raise InvalidRequest(
            f"A sweep can't vary {shown!a}, because {reason}.",
            code="fixed_in_a_sweep",
            remedy=f"Remove {shown!a} from 'parameters'. To use several values, create one sweep for each.",
            param=param,
        )
    similar = _nearest(shown)
    raise InvalidRequest(
        f"There is no job field {shown!a}.",
        code="unknown_parameter",
        remedy=f"Did you mean {similar!r}? Use the dotted path of a job field."
        if similar
        else "Use the dotted path of a job field, such as 'lora.rank'.",
        param=param,
    )


def _nearest(path: str) -> str | None:
    """Return the field with the same last part, else the most similar path; None if none is similar enough."""

    def last(path: str) -> str:
        return path.rpartition(".")[2]

    def similarity(known: str) -> float:
        pairs = (path, known), (name, last(known))
        return max(difflib.SequenceMatcher(None, one, other).ratio() for one, other in pairs)

    name = last(path).lstrip("-").replace("-", "_")
    name = OTHER_NAMES.get(name, name)
    best = next((known for known in VARIABLE if last(known) == name), None) or max(VARIABLE, key=similarity)
    return best if similarity(best) >= ALIKE else None


def _check_range(path: str, parameter: Parameter, search: Search) -> None:
    """Check that a range is of a numeric field, has whole limits for whole numbers, and has points only in a grid."""
    code = "invalid_value"
    if search.is_pruned and path == EVERY_STEPS:
        code = "fixed_in_a_sweep"
        problem = f"With the pruner asha, a sweep can't vary {EVERY_STEPS}: trials are compared at their evaluations."
        remedy = f"Remove {EVERY_STEPS} from 'parameters'."
    elif parameter.values is not None:
        return
    elif kind_of(path) == "other":
        problem = f"'parameters' sets a range for {path!r}, but this field is not a number."
        remedy = "Replace the range with a list of values in 'values'."
    elif kind_of(path) == "integer" and not all(end.is_integer() for end in _range(parameter)):
        low, high = _range(parameter)
        problem = f"The range of {path!r} is from {low:.15g} to {high:.15g}, but this field must be a whole number."
        remedy = "Set 'min' and 'max' to whole numbers."
    elif search.type == "grid" and parameter.points is None:
        problem = f"In a grid sweep, the range of {path!r} requires 'points'."
        remedy = "Set 'points' to the number of values, or replace the range with a list of values in 'values'."
    elif search.type != "grid" and parameter.points is not None:
        problem = f"The range of {path!r} has 'points', which only grid sweeps support, but search.type is "
        problem += f"{search.type!r}."
        remedy = "Remove 'points'."
    else:
        return
    raise InvalidRequest(problem, code=code, remedy=remedy, param=f"parameters.{path}")


def _check_objective(request: SweepRequest) -> None:
    metric = request.objective.metric
    if metric.startswith("valid") and request.validation_file is None:
        raise InvalidRequest(
            f"objective.metric is '{metric}', which requires a validation file.",
            code="validation_file_required",
            remedy="Set validation_file, or set objective.metric to 'train_loss'.",
            param="validation_file",
        )
    if "reward" in metric and request.method_type == "supervised":
        raise InvalidRequest(
            f"objective.metric is '{metric}', which is not available for method 'supervised'.",
            code="metric_of_another_method",
            remedy="Set objective.metric to 'valid_loss'. Only preference methods, such as 'dpo', have reward metrics.",
            param="objective.metric",
        )


def _grid_size(parameters: Mapping[str, Parameter]) -> int:
    sizes = [len(grid_values(path, parameter)) for path, parameter in parameters.items()]
    size = math.prod(sizes)
    if size > MAX_TRIALS:
        without_points = ", and remove 'points' from the ranges" if any(p.points for p in parameters.values()) else ""
        raise InvalidRequest(
            f"The grid has {size:,} combinations ({' by '.join(map(str, sizes))}), but a sweep can have at most "
            f"{MAX_TRIALS:,} trials.",
            code="grid_too_large",
            remedy="Use fewer values or points. Or set search.type to 'random' and search.trials to the number of "
            f"trials{without_points}.",
            param="parameters",
        )
    return size


def _range(parameter: Parameter) -> tuple[float, float]:
    assert parameter.min is not None
    assert parameter.max is not None
    return parameter.min, parameter.max


def _refused(error: ValidationError, body: Json, parameters: Mapping[str, Any]) -> InvalidRequest:
    """Return the job's validation error, with the parameters at fault. If none is, the shared fields are invalid."""
    problems = cast(list[Problem], error.errors(include_url=False))
    grouped = by_field(
        (field_path(problem["loc"], body, is_missing=problem["type"] == "missing"), problem) for problem in problems
    )
    place, group = next(iter(grouped.items()))
    about = {
        path: value
        for path, value in parameters.items()
        if f"{place}.".startswith(f"{path}.") or f"{path}.".startswith(f"{place}." if place else "")
    }
    text = ", ".join(f"{path} = {value_text(value)}" for path, value in about.items())
    label = f" in the trial with {text if len(text) <= MAX_TEXT else f'{text[:MAX_TEXT]}…'}" if about else ""
    reason, remedy = _reason(place, group, list(about))
    return InvalidRequest(
        f"Invalid value{label}: {reason}.",
        code="invalid_value" if group[0]["type"] != "extra_forbidden" else "unknown_parameter",
        remedy=remedy,
        param=f"parameters.{next(iter(about))}" if about else place or None,
    )


def _reason(place: str, group: Sequence[Problem], varied: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong at `place`, and the remedy. `varied`: the parameters at fault."""
    kind = group[0]["type"]
    usual = f"Correct {place!r}, which all trials share." if place else "Correct the fields that all trials share."
    if varied:
        usual = f"Change {' or '.join(map(repr, varied))} in 'parameters'"
        is_inside = any(f"{place}.".startswith(f"{path}.") for path in varied)
        usual += "." if is_inside else ", or the related fields that all trials share."
    inner = [path for path, _ in fields_of(JobRequest) if path.rpartition(".")[0] == place]
    if kind in GROUP_WANTED and inner:
        return f"{place!r} is a group of fields", f"Vary the fields in it, such as {', '.join(map(repr, inner[:3]))}."
    if kind == "missing":
        return f"{place!r} is missing", f"Set {place!r}."
    if kind == "extra_forbidden":
        return f"there is no job field {place!r}", f"Remove {place!r}, or correct its spelling."
    text = expectation(group)
    whole = text.removeprefix("is invalid: ")
    return f"{place!r} {text}" if place and whole == text else whole, usual
