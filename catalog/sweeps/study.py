"""Chooses the parameters of trials, and judges trials at rungs, with Optuna.

An Optuna study exists only in memory: it is rebuilt from the rows of the trials for each decision. Any API server can
therefore decide, and a decision depends only on these rows, the sweep's seed and the number of the trial.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from catalog.spec.model_fields import plain_types
from catalog.spec.sweep import VARIABLE, Parameter, SearchType
from catalog.states import FINAL_STATES, JobState
from catalog.tables.jobs import Trial

DIGITS = 6
"""Significant digits of a sampled number: enough for a search, and few enough to read."""
Json = dict[str, Any]
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True, slots=True)
class PastTrial:
    """A trial and the state of its job."""

    trial: Trial
    state: JobState


def kind_of(path: str) -> Literal["integer", "number", "other"]:
    """Return the kind of number that a job field contains; `other` if it does not contain a number."""
    plain = set(plain_types(VARIABLE[path]))
    return "number" if float in plain else "integer" if int in plain else "other"


def grid(parameters: Mapping[str, Parameter]) -> list[Json]:
    """Return every combination. The last parameter changes fastest."""
    combinations = itertools.product(*(grid_values(path, parameter) for path, parameter in parameters.items()))
    return [dict(zip(parameters, values, strict=True)) for values in combinations]


def grid_values(path: str, parameter: Parameter) -> list[Any]:
    """Return the distinct values in order. For whole numbers there may be fewer than `points`."""
    if parameter.values is not None:
        return parameter.values
    low, high, points = parameter.min, parameter.max, parameter.points
    assert low is not None
    assert high is not None
    assert points is not None
    parts = (step / (points - 1) for step in range(points))
    numbers = (low * (high / low) ** part if parameter.scale == "log" else low + part * (high - low) for part in parts)
    return list(dict.fromkeys(_readable(path, parameter, number) for number in numbers))


def suggest(
    parameters: Mapping[str, Parameter],
    numbers: Iterable[int],
    *,
    method: SearchType,
    seed: int,
    past: Sequence[PastTrial] = (),
) -> list[Json]:
    """Return the parameters of the trials with these numbers. Not for a grid.

    past: all existing trials, in the order of their numbers. Only tpe learns from them.
    """
    space = {path: _distribution(path, parameter) for path, parameter in parameters.items()}
    study = optuna.create_study()
    study.add_trials([_past_trial(each, space) for each in past])
    chosen: list[Json] = []
    for number in numbers:
        trial_seed = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
        study.sampler = (TPESampler if method == "tpe" else RandomSampler)(seed=trial_seed)
        suggested = study.ask(space).params
        chosen.append(
            {
                path: json.loads(suggested[path])
                if parameter.values is not None
                else _readable(path, parameter, suggested[path])
                for path, parameter in parameters.items()
            }
        )
    return chosen


def judge(rungs: Json, trials: Sequence[Trial], waiting: Container[str]) -> dict[str, bool]:
    """Judge the trials of the waiting jobs, each at the rung that it reached. Returns by job id whether it must stop.

    A trial continues at a rung if it is among the best 1/`reduction_factor` of the trials that have reached the rung so
    far. While fewer than `reduction_factor` trials have reached it, only the best one so far continues. trials: all
    that have reached any rung. Updates `pruner_state`, where Optuna keeps the scores of a trial at the rungs.
    """
    pruner = SuccessiveHalvingPruner(min_resource=rungs["min_steps"], reduction_factor=rungs["reduction_factor"])
    study = optuna.create_study(direction="minimize")  # of scores, lower is better
    study.add_trials([_measured_trial(trial) for trial in trials])
    verdicts: dict[str, bool] = {}
    for number, trial in enumerate(trials):
        if trial.job_id in waiting:
            verdicts[trial.job_id] = pruner.prune(study, study.get_trials(deepcopy=False)[number])
            trial.pruner_state = dict(study.get_trials(deepcopy=False)[number].system_attrs)
    return verdicts


def _readable(path: str, parameter: Parameter, number: float) -> float:
    """Return a number of the range as a whole number, or rounded to DIGITS."""
    if kind_of(path) == "integer":
        return math.floor(number + 0.5)
    assert parameter.min is not None
    assert parameter.max is not None
    return min(parameter.max, max(parameter.min, float(f"{number:.{DIGITS}g}")))


def _distribution(path: str, parameter: Parameter) -> BaseDistribution:
    """Values are compared as JSON, because Python considers true and 1 as equal, and Optuna supports no lists."""
    if parameter.values is not None:
        return CategoricalDistribution([json.dumps(value) for value in parameter.values])
    assert parameter.min is not None
    assert parameter.max is not None
    is_log = parameter.scale == "log"
    if kind_of(path) == "integer":
        return IntDistribution(int(parameter.min), int(parameter.max), log=is_log)
    return FloatDistribution(parameter.min, parameter.max, log=is_log)


def _past_trial(past: PastTrial, space: dict[str, BaseDistribution]) -> FrozenTrial:
    row = past.trial
    is_measured = row.step is not None
    if past.state not in FINAL_STATES:
        state = TrialState.RUNNING
    elif past.state == JobState.SUCCEEDED and is_measured:
        state = TrialState.COMPLETE
    else:
        state = TrialState.PRUNED if row.stopped is not None else TrialState.FAIL
    return create_trial(
        state=state,
        value=row.score if state is TrialState.COMPLETE else None,
        params={
            path: json.dumps(value) if isinstance(space[path], CategoricalDistribution) else value
            for path, value in row.parameters.items()
        },
        distributions=space,
        intermediate_values={row.step: row.score} if row.step is not None else {},
    )


def _measured_trial(row: Trial) -> FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        system_attrs=row.pruner_state or {},
        intermediate_values={}
        if row.reached_step is None or row.reached_score is None
        else {row.reached_step: row.reached_score},
    )
