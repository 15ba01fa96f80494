"""The design of a sweep: the job request of each trial. Contains all checks that need no database; pure.

The complete request of each trial is checked before any job exists, so no trial can fail because of a value of the
sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from catalog.errors import InvalidRequest
from catalog.search.asha import USUAL_FACTOR, Rungs, usual_min_steps
from catalog.search.fields import check_path, fields_in, value_at, with_values
from catalog.search.space import Dimension, dimension, grid_point, grid_size, random_point
from catalog.search.spec import MAX_TRIALS, Goal, Metric, Parameter, Search, SearchType, SweepRequest
from catalog.spec import evaluation_schedule
from catalog.spec.job import JobRequest, resolve
from catalog.spec.validation_messages import Problem, by_field, expectation, field_path, value_text

EVERY_STEPS = "evaluation.every_steps"
ASHA_ONLY = ("reduction_factor", "min_steps", "max_rungs")
"""Fields of `search` that other search methods reject."""
MAX_SHOWN = 160
GROUP_WANTED = frozenset({"dict_type", "model_type", "model_attributes_type"})
"""pydantic's error types for a value in place of an object."""
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Everything that determines the trials of a sweep."""

    template: Json
    """The fields that all trials share, as the body of a job."""
    dimensions: tuple[Dimension, ...]
    search: SearchType
    seed: int
    num_trials: int
    """Number of trials; for ask_tell the maximum."""
    metric: Metric
    goal: Goal
    rungs: Rungs | None = None
    """None: no trial is stopped."""

    def parameters_of(self, number: int) -> Json:
        """Return the parameters of a trial. Not for ask_tell, where the client sets them."""
        if self.search == "grid":
            return grid_point(self.dimensions, number)
        return random_point(self.dimensions, seed=self.seed, number=number)

    def request_of(self, parameters: Mapping[str, Any]) -> JobRequest:
        """Return the job request of a trial with these parameters. Raises InvalidRequest with the invalid field."""
        body = with_values({"seed": self.seed, **self.template}, parameters)
        is_free = value_at(body, EVERY_STEPS) in (None, "auto")
        if self.rungs is not None and self.metric.startswith("valid") and is_free:
            body = with_values(body, {EVERY_STEPS: self.rungs.min_steps})
        try:
            return JobRequest.model_validate(body)
        except ValidationError as error:
            raise _refused(error, body, parameters) from error


def designed(request: SweepRequest, *, seed: int) -> Design:
    """Return the design without its rungs, which depend on the length of the data; see `rungs`. Raises InvalidRequest.

    `seed`: used if the request sets none.
    """
    for path, parameter in request.parameters.items():
        check_path(path, param=f"parameters.{path}")
        _check_range(path, parameter, request.search.type)
    _check_overlap(list(request.parameters))
    _check_objective(request)
    dimensions = tuple(dimension(path, parameter) for path, parameter in request.parameters.items())
    return Design(
        template=request.template(),
        dimensions=dimensions,
        search=request.search.type,
        seed=seed if request.search.seed is None else request.search.seed,
        num_trials=_num_trials(request.search, dimensions),
        metric=request.objective.metric,
        goal=request.objective.resolved_goal(),
    )


def checked(design: Design) -> list[JobRequest]:
    """Check both limits of each range, then return the requests of all trials that are known in advance.

    For ask_tell, only the shared fields are checked. Raises InvalidRequest.
    """
    if design.search == "ask_tell":
        design.request_of({})
        return []
    first = {each.path: _ends(each)[0] for each in design.dimensions}
    for each in design.dimensions:
        for value in _ends(each) if each.values is None else ():
            design.request_of({**first, each.path: value})
    return [design.request_of(design.parameters_of(number)) for number in range(design.num_trials)]


def check_given(parameters: Mapping[str, Any]) -> None:
    """Check that the client's parameters of an ask_tell trial are fields that may vary. Raises InvalidRequest."""
    for path in parameters:
        check_path(path, param=f"parameters.{path}")
    _check_overlap(list(parameters))


def fewest_steps(requests: Sequence[JobRequest], *, num_rows: int) -> int | None:
    """Return the maximum steps of the shortest trial, for a training file of `num_rows`; None if there is no bound."""
    known: list[int] = []
    for request in requests:
        spec = resolve(request, num_rows=num_rows, max_positions=None, seed=0)
        steps = evaluation_schedule.most_steps(spec, num_rows)
        if steps is not None:
            known.append(steps)
    return min(known, default=None)


def rungs(search: Search, design: Design, fewest: int | None) -> Rungs:
    """Return the rungs of an asha sweep. `fewest`: steps of its shortest trial.

    Raises InvalidRequest if the first rung is not at an evaluation, or not before the last step of the shortest trial.
    """
    factor = search.reduction_factor or USUAL_FACTOR
    interval = value_at(design.template, EVERY_STEPS)
    every = interval if isinstance(interval, int) and not isinstance(interval, bool) else 1
    if search.min_steps is None and fewest is None:
        raise InvalidRequest(
            "search.min_steps is required: data.overflow is 'split', so the number of steps in each trial is unknown "
            "until the training texts have been split.",
            code="min_steps_required",
            remedy="Set search.min_steps, or set max_steps for all trials.",
            param="search.min_steps",
        )
    first = search.min_steps or usual_min_steps(fewest or 1, reduction_factor=factor, multiple_of=every)
    if first % every:
        raise InvalidRequest(
            f"search.min_steps is {first}, which is not a multiple of {EVERY_STEPS} ({every}).",
            code="rung_without_evaluation",
            remedy=f"Set search.min_steps to a multiple of {every}, or omit {EVERY_STEPS}.",
            param="search.min_steps",
        )
    if fewest is not None and first >= fewest:
        raise _no_rung(search, first, fewest=fewest, every=every)
    return Rungs(min_steps=first, reduction_factor=factor, max_rungs=search.max_rungs)


def _no_rung(search: Search, first: int, *, fewest: int, every: int) -> InvalidRequest:
    """Return the error for a first rung that the shortest trial does not reach. `every`: the evaluation interval."""
    used = [f"search.{name}" for name in ASHA_ONLY if getattr(search, name) is not None]
    others = f"train for more steps (max_steps or n_epochs), or set search.type to 'random'{_and_remove(used)}."
    param = "search.min_steps"
    if fewest == 1:
        remedy, param = f"{others[0].upper()}{others[1:]}", "search.type"
    elif search.min_steps is None:
        remedy, param = f"Set {EVERY_STEPS} to less than {fewest}, {others}", EVERY_STEPS
    elif every >= fewest:
        remedy = f"Set {EVERY_STEPS} and search.min_steps to less than {fewest}, {others}"
    else:
        multiple = f" and to a multiple of {every}" if every > 1 else ""
        remedy = f"Set search.min_steps to less than {fewest}{multiple}, {others}"
    return InvalidRequest(
        f"The first rung is at step {first}, but the shortest trial ends at step {fewest}, so that trial can't be "
        "stopped early.",
        code="no_rung_in_time",
        remedy=remedy,
        param=param,
    )


def _and_remove(fields: Sequence[str]) -> str:
    return f" and remove {' and '.join(fields)}" if fields else ""


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Return the parameters for a sentence: `lora.rank = 8, optimizer.learning_rate = 0.001`."""
    text = ", ".join(f"{path} = {value_text(value)}" for path, value in parameters.items())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _check_objective(request: SweepRequest) -> None:
    if request.objective.metric.startswith("valid") and request.validation_file is None:
        raise InvalidRequest(
            f"objective.metric is '{request.objective.metric}', which requires a validation file.",
            code="validation_file_required",
            remedy="Set validation_file, or set objective.metric to 'train_loss'.",
            param="validation_file",
        )
    if "reward" in request.objective.metric and request.method_type == "supervised":
        raise InvalidRequest(
            f"objective.metric is '{request.objective.metric}', which is not available for method 'supervised'.",
            code="metric_of_another_method",
            remedy="Set objective.metric to 'valid_loss'. Only preference methods, such as 'dpo', have reward metrics.",
            param="objective.metric",
        )


def _check_range(path: str, parameter: Parameter, search: SearchType) -> None:
    """Check that a range is of a numeric field, has whole limits for whole numbers, and has points only in a grid."""
    param = f"parameters.{path}"
    if search == "asha" and path == EVERY_STEPS:
        raise InvalidRequest(
            f"An asha sweep can't vary {EVERY_STEPS}, because the rungs determine when trials are evaluated.",
            code="fixed_in_a_sweep",
            remedy=f"Remove {EVERY_STEPS} from 'parameters'.",
            param=param,
        )
    if parameter.values is not None:
        return
    each = dimension(path, parameter)
    if each.kind == "other":
        problem = f"'parameters' sets a range for {path!r}, but this field is not a number."
        refused = problem, "Replace the range with a list of values in 'values'.", "invalid_value"
    elif each.kind == "integer" and not (each.low.is_integer() and each.high.is_integer()):
        problem = (
            f"The range of {path!r} is from {each.low:.15g} to {each.high:.15g}, but this field must be a whole number."
        )
        refused = problem, "Set 'min' and 'max' to whole numbers.", "invalid_value"
    elif search == "grid" and parameter.points is None:
        problem = f"In a grid sweep, the range of {path!r} requires 'points'."
        remedy = "Set 'points' to the number of values, or replace the range with a list of values in 'values'."
        refused = problem, remedy, "invalid_value"
    elif search != "grid" and parameter.points is not None:
        problem = f"The range of {path!r} has 'points', which only grid sweeps support, but search.type is {search!r}."
        refused = problem, "Remove 'points'.", "invalid_value"
    else:
        return
    message, remedy, code = refused
    raise InvalidRequest(message, code=code, remedy=remedy, param=param)


def _check_overlap(paths: Sequence[str]) -> None:
    for path in paths:
        outer = next((other for other in paths if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise InvalidRequest(
                f"Parameter {outer!r} includes parameter {path!r}, so a sweep can't vary both.",
                code="overlapping_parameters",
                remedy=f"Remove {outer!r} or {path!r} from 'parameters'.",
                param=f"parameters.{path}",
            )


def _num_trials(search: Search, dimensions: Sequence[Dimension]) -> int:
    if search.type != "grid":
        assert search.trials is not None
        return search.trials
    size = grid_size(dimensions)
    if size > MAX_TRIALS:
        sizes = " by ".join(str(grid_size([each])) for each in dimensions)
        without_points = ", and remove 'points' from the ranges" if any(each.points for each in dimensions) else ""
        raise InvalidRequest(
            f"The grid has {size:,} combinations ({sizes}), but a sweep can have at most {MAX_TRIALS:,} trials.",
            code="grid_too_large",
            remedy="Use fewer values or points. Or set search.type to 'random' and search.trials to the number of "
            f"trials{without_points}.",
            param="parameters",
        )
    return size


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    if dimension.values is not None:
        return dimension.values
    ends = (dimension.low, dimension.high)
    return tuple(int(end) for end in ends) if dimension.kind == "integer" else ends


def _refused(error: ValidationError, body: Json, parameters: Mapping[str, Any]) -> InvalidRequest:
    """Return the job's validation error, with the parameters at fault. If none is, the shared fields are invalid."""
    problems = cast(list[Problem], error.errors(include_url=False))
    grouped = by_field((_place(problem, body), problem) for problem in problems)
    place, group = next(iter(grouped.items()))
    about = {
        path: value
        for path, value in parameters.items()
        if f"{place}.".startswith(f"{path}.") or f"{path}.".startswith(f"{place}." if place else "")
    }
    label = f" in the trial with {parameters_text(about)}" if about else ""
    reason, remedy = _reason(place, group, list(about))
    return InvalidRequest(
        f"Invalid value{label}: {reason}.",
        code="invalid_value" if group[0]["type"] != "extra_forbidden" else "unknown_parameter",
        remedy=remedy,
        param=f"parameters.{next(iter(about))}" if about else place or None,
    )


def _place(problem: Problem, body: Json) -> str:
    return field_path(problem["loc"], body, is_missing=problem["type"] == "missing")


def _reason(place: str, group: Sequence[Problem], varied: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong at `place`, and the remedy. `varied`: the parameters at fault."""
    kind = group[0]["type"]
    usual = f"Correct {place!r}, which all trials share." if place else "Correct the fields that all trials share."
    if varied:
        usual = f"Change {' or '.join(map(repr, varied))} in 'parameters'"
        is_inside = any(f"{place}.".startswith(f"{path}.") for path in varied)
        usual += "." if is_inside else ", or the related fields that all trials share."
    if kind in GROUP_WANTED and (inner := fields_in(place)):
        return f"{place!r} is a group of fields", f"Vary the fields in it, such as {', '.join(map(repr, inner[:3]))}."
    if kind == "missing":
        return f"{place!r} is missing", f"Set {place!r}."
    if kind == "extra_forbidden":
        return f"there is no job field {place!r}", f"Remove {place!r}, or correct its spelling."
    text = expectation(group)
    whole = text.removeprefix("is invalid: ")
    return f"{place!r} {text}" if place and whole == text else whole, usual
