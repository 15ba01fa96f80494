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

from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest
from catalog.spec.job import JobRequest, most_steps, resolve
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
            raise InvalidRequest("overlapping_parameters", outer=outer, path=path, param=f"parameters.{path}")
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
    known = [steps for spec in specs if (steps := most_steps(spec, num_rows)) is not None]
    fewest = min(known, default=None)
    if search.min_steps is None and fewest is None:
        raise InvalidRequest("min_steps_required", param="search.min_steps")
    interval = value_at(design.template, EVERY_STEPS) if design.metric.startswith("valid") else None
    every = interval if isinstance(interval, int) else 1
    wanted = search.min_steps or max(1, (fewest or 1) // factor**USUAL_RUNGS)
    first = math.ceil(wanted / every) * every
    if fewest is not None and first >= fewest:
        raise InvalidRequest(
            "no_rung_in_time",
            first=first,
            fewest=fewest,
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
        raise InvalidRequest("fixed_in_a_sweep", shown=shown, reason=reason, param=param)
    similar = _nearest(shown)
    if similar:
        raise InvalidRequest("unknown_job_field_like", shown=shown, similar=similar, param=param)
    raise InvalidRequest("unknown_job_field", shown=shown, param=param)


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
    param = f"parameters.{path}"
    if search.is_pruned and path == EVERY_STEPS:
        raise InvalidRequest("interval_fixed_in_a_sweep", param=param)
    if parameter.values is not None:
        return
    if kind_of(path) == "other":
        raise InvalidRequest("range_not_of_number", path=path, param=param)
    if kind_of(path) == "integer" and not all(end.is_integer() for end in _range(parameter)):
        low, high = _range(parameter)
        raise InvalidRequest("range_not_of_whole_numbers", path=path, low=low, high=high, param=param)
    if search.type == "grid" and parameter.points is None:
        raise InvalidRequest("range_without_points", path=path, param=param)
    if search.type != "grid" and parameter.points is not None:
        raise InvalidRequest("range_with_points", path=path, type=search.type, param=param)


def _check_objective(request: SweepRequest) -> None:
    metric = request.objective.metric
    if metric.startswith("valid") and request.validation_file is None:
        raise InvalidRequest("validation_file_required_for_sweep", metric=metric, param="validation_file")
    if "reward" in metric and request.method_type == "supervised":
        raise InvalidRequest("metric_of_another_method", metric=metric, param="objective.metric")


def _grid_size(parameters: Mapping[str, Parameter]) -> int:
    sizes = [len(grid_values(path, parameter)) for path, parameter in parameters.items()]
    size = math.prod(sizes)
    if size > MAX_TRIALS:
        raise InvalidRequest(
            "grid_with_points_too_large" if any(p.points for p in parameters.values()) else "grid_too_large",
            size=size,
            sizes=" by ".join(map(str, sizes)),
            max_trials=MAX_TRIALS,
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
    reason, remedy = _reason(place, group, list(about))
    text = ErrorText(
        code="invalid_value" if group[0]["type"] != "extra_forbidden" else "unknown_parameter",
        message=f"Invalid value in the trial with {_shortened(text)}: {reason}."
        if about
        else f"Invalid value: {reason}.",
        remedy=remedy,
        param=f"parameters.{next(iter(about))}" if about else place or None,
    )
    return InvalidRequest(text)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


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
