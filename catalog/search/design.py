"""A sweep as it was designed: what each trial asks for. Every refusal that needs no database; pure.

Each trial's whole request is checked before any job exists, so that none of them fails by a value of the sweep's.
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
from catalog.spec.validation_messages import Problem, by_field, expectation, field_path

EVERY_STEPS = "evaluation.every_steps"
MAX_SHOWN = 160
GROUP_WANTED = frozenset({"dict_type", "model_type", "model_attributes_type"})
"""What pydantic says where a value stands for an object."""
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """All that its trials follow from."""

    template: Json
    """The body of a job that all trials share."""
    dimensions: tuple[Dimension, ...]
    search: SearchType
    seed: int
    num_trials: int
    """Of ask_tell: at most."""
    metric: Metric
    goal: Goal
    rungs: Rungs | None = None
    """None: no trial is stopped."""

    def parameters_of(self, number: int) -> Json:
        """Of a trial that the client does not choose."""
        if self.search == "grid":
            return grid_point(self.dimensions, number)
        return random_point(self.dimensions, seed=self.seed, number=number)

    def request_of(self, parameters: Mapping[str, Any]) -> JobRequest:
        """The job that a trial with these parameters is. Raises InvalidRequest that names what is at fault."""
        body = with_values({"seed": self.seed, **self.template}, parameters)
        is_free = value_at(body, EVERY_STEPS) in (None, "auto")
        if self.rungs is not None and self.metric.startswith("valid") and is_free:
            body = with_values(body, {EVERY_STEPS: self.rungs.min_steps})
        try:
            return JobRequest.model_validate(body)
        except ValidationError as error:
            raise _refused(error, body, parameters) from error


def designed(request: SweepRequest, *, seed: int) -> Design:
    """All but its rungs, which the length of its data decides: see `with_rungs`. Raises InvalidRequest.

    seed: used where the request names none.
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
    """Of every trial that is known beforehand; first each limit of each range by itself. Raises InvalidRequest."""
    if design.search == "ask_tell":
        design.request_of({})
        return []
    first = {each.path: _ends(each)[0] for each in design.dimensions}
    for each in design.dimensions:
        for value in _ends(each) if each.values is None else ():
            design.request_of({**first, each.path: value})
    return [design.request_of(design.parameters_of(number)) for number in range(design.num_trials)]


def check_given(parameters: Mapping[str, Any]) -> None:
    """Of a trial that the client chooses: that each is a field that may vary. Raises InvalidRequest."""
    for path in parameters:
        check_path(path, param=f"parameters.{path}")
    _check_overlap(list(parameters))


def fewest_steps(requests: Sequence[JobRequest], *, num_rows: int) -> int | None:
    """That a trial can have at most, over a training file of so many rows; None where nothing bounds them."""
    known: list[int] = []
    for request in requests:
        spec = resolve(request, num_rows=num_rows, max_positions=None, seed=0)
        steps = evaluation_schedule.most_steps(spec, num_rows)
        if steps is not None:
            known.append(steps)
    return min(known, default=None)


def rungs(search: Search, design: Design, fewest: int | None) -> Rungs:
    """Of an asha sweep. fewest: steps that the shortest of its trials has. Raises InvalidRequest where no trial
    could come to a rung before its end."""
    factor = search.reduction_factor or USUAL_FACTOR
    said = value_at(design.template, EVERY_STEPS)
    every = said if isinstance(said, int) and not isinstance(said, bool) else 1
    if search.min_steps is None and fewest is None:
        raise InvalidRequest(
            "How many steps the trials have is not known before their texts are split.",
            code="min_steps_required",
            remedy="Give search.min_steps, or max_steps.",
            param="search.min_steps",
        )
    first = search.min_steps or usual_min_steps(fewest or 1, reduction_factor=factor, multiple_of=every)
    if first % every:
        raise InvalidRequest(
            f"Trials are evaluated every {every} steps, and the first rung is at {first}.",
            code="rung_without_evaluation",
            remedy=f"Leave {EVERY_STEPS} out, or make search.min_steps a multiple of it.",
            param="search.min_steps",
        )
    if fewest is not None and first >= fewest:
        raise InvalidRequest(
            f"The first rung is at step {first}, and a trial has {fewest} steps at most: none would be stopped.",
            code="no_rung_in_time",
            remedy="Lower search.min_steps, train for longer, or search by random.",
            param="search.min_steps",
        )
    return Rungs(min_steps=first, reduction_factor=factor, max_rungs=search.max_rungs)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """For a sentence: `lora.rank = 8, optimizer.learning_rate = 0.001`."""
    text = ", ".join(f"{path} = {value!r}" for path, value in parameters.items())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _check_objective(request: SweepRequest) -> None:
    if request.objective.metric.startswith("valid") and request.validation_file is None:
        raise InvalidRequest(
            f"{request.objective.metric} is measured on held-out data, and the sweep has none.",
            code="validation_file_required",
            remedy="Give a validation_file, or compare trials by objective.metric train_loss.",
            param="validation_file",
        )
    if "reward" in request.objective.metric and request.method_type == "supervised":
        raise InvalidRequest(
            f"The method supervised has no {request.objective.metric}: it compares no answers.",
            code="metric_of_another_method",
            remedy="Choose objective.metric valid_loss, or a method that compares answers.",
            param="objective.metric",
        )


def _check_range(path: str, parameter: Parameter, search: SearchType) -> None:
    """That a range is of numbers, whole ones for a whole number; and of a grid, cut into points."""
    param = f"parameters.{path}"
    if search == "asha" and path == EVERY_STEPS:
        raise InvalidRequest(
            "The rungs of asha decide when trials are evaluated.",
            code="fixed_in_a_sweep",
            remedy=f"Leave {EVERY_STEPS} out of parameters.",
            param=param,
        )
    if parameter.values is not None:
        return
    each = dimension(path, parameter)
    if each.kind == "other":
        problem, remedy = f"{path!r} is not a number", "Give its values as a list, in `values`."
    elif each.kind == "integer" and not (each.low.is_integer() and each.high.is_integer()):
        problem, remedy = f"{path!r} is a whole number", "Give min and max as whole numbers."
    elif search == "grid" and parameter.points is None:
        problem, remedy = f"{path!r} has no end of values", "Give `points`, or list its `values`."
    elif search != "grid" and parameter.points is not None:
        problem, remedy = f"points of {path!r} belong to a grid", "Leave `points` out."
    else:
        return
    raise InvalidRequest(f"In a {search} sweep {problem}.", code="invalid_value", remedy=remedy, param=param)


def _check_overlap(paths: Sequence[str]) -> None:
    for path in paths:
        outer = next((other for other in paths if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise InvalidRequest(
                f"{path!r} lies within {outer!r}, and both are to vary.",
                code="overlapping_parameters",
                remedy="Vary one of them.",
                param=f"parameters.{path}",
            )


def _num_trials(search: Search, dimensions: Sequence[Dimension]) -> int:
    if search.type != "grid":
        assert search.trials is not None
        return search.trials
    size = grid_size(dimensions)
    if size > MAX_TRIALS:
        raise InvalidRequest(
            f"The grid has {size:,} combinations; at most {MAX_TRIALS:,} are allowed.",
            code="grid_too_large",
            remedy="Give fewer values or points, or search by random with as many trials as you want.",
            param="parameters",
        )
    return size


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    if dimension.values is not None:
        return dimension.values
    ends = (dimension.low, dimension.high)
    return tuple(int(end) for end in ends) if dimension.kind == "integer" else ends


def _refused(error: ValidationError, body: Json, parameters: Mapping[str, Any]) -> InvalidRequest:
    """The job's own refusal, with the parameters that it is about; the template itself may be at fault too."""
    problems = cast(list[Problem], error.errors(include_url=False))
    grouped = by_field((_place(problem, body), problem) for problem in problems)
    place, group = next(iter(grouped.items()))
    about = {
        path: value
        for path, value in parameters.items()
        if f"{place}.".startswith(f"{path}.") or f"{path}.".startswith(f"{place}." if place else "")
    }
    where = f"With {parameters_text(about)}" if about else "As it stands"
    reason, remedy = _reason(place, group)
    return InvalidRequest(
        f"{where}, a trial is refused: {reason}.",
        code="invalid_value" if group[0]["type"] != "extra_forbidden" else "unknown_parameter",
        remedy=remedy,
        param=f"parameters.{next(iter(about))}" if about else place or None,
    )


def _place(problem: Problem, body: Json) -> str:
    return field_path(problem["loc"], body, is_missing=problem["type"] == "missing")


def _reason(place: str, group: Sequence[Problem]) -> tuple[str, str]:
    """What is wrong there, and what to do about it."""
    kind = group[0]["type"]
    usual = "Leave that value out, or change what the sweep gives every trial."
    if kind in GROUP_WANTED and (inner := fields_in(place)):
        return f"{place!r} is a group of fields", f"Vary fields in it, such as {', '.join(map(repr, inner[:3]))}."
    if kind == "missing":
        return f"{place!r} is missing", usual
    if kind == "extra_forbidden":
        return f"there is no field {place!r}", usual
    text = expectation(group)
    whole = text.removeprefix("is refused: ")
    return f"{place!r} {text}" if place and whole == text else whole, usual
