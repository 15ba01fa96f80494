"""Sweep designs without a database: parameters, grid and random points, and rungs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.pruners._successive_halving import _is_trial_promotable_to_next_rung
from optuna.study import StudyDirection

from catalog.errors import InvalidRequest
from catalog.search.asha import Rungs, usual_min_steps
from catalog.search.design import Design, checked, designed, fewest_steps, rungs
from catalog.search.space import dimension, grid_point, grid_size, random_point
from catalog.search.spec import MAX_TRIALS, Parameter, SweepRequest

RATE = {"min": 1e-5, "max": 1e-2, "scale": "log"}
RANK = {"values": [4, 8, 16]}


def sweep_request(**fields: Any) -> SweepRequest:
    usual = {"model": "smol", "training_file": "file-a", "validation_file": "file-b", "search": {"type": "grid"}}
    return SweepRequest.model_validate({**usual, "parameters": {"lora.rank": RANK}, **fields})


def design_of(**fields: Any) -> Design:
    return designed(sweep_request(**fields), seed=1)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        checked(design_of(**fields))
    return error.value


def test_grid_contains_every_combination_once() -> None:
    parameters = {
        "lora.rank": RANK,
        "optimizer.learning_rate": {**RATE, "points": 4},
        "lora.use_dora": {"values": [True, False]},
    }
    design = design_of(parameters=parameters)

    made = [tuple(design.parameters_of(number).items()) for number in range(design.num_trials)]

    assert design.num_trials == 3 * 4 * 2
    assert len(set(made)) == 24
    assert dict(made[0]) == {"lora.rank": 4, "optimizer.learning_rate": 1e-5, "lora.use_dora": True}
    assert dict(made[-1]) == {"lora.rank": 16, "optimizer.learning_rate": 1e-2, "lora.use_dora": False}


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), number=st.integers(0, MAX_TRIALS - 1))
def test_random_points_are_in_range_and_depend_on_seed_and_number_only(seed: int, number: int) -> None:
    named = {
        "optimizer.learning_rate": RATE,
        "lora.rank": {"min": 1, "max": 256, "scale": "log"},
        "seed": {"min": 0, "max": 9},
    }
    dimensions = [dimension(path, Parameter.model_validate(fields)) for path, fields in named.items()]

    drawn = random_point(dimensions, seed=seed, number=number)

    assert 1e-5 <= drawn["optimizer.learning_rate"] <= 1e-2
    assert type(drawn["lora.rank"]) is int
    assert 1 <= drawn["lora.rank"] <= 256
    assert 0 <= drawn["seed"] <= 9
    assert drawn == random_point(dimensions, seed=seed, number=number)
    assert drawn["lora.rank"] == random_point(dimensions[1:], seed=seed, number=number)["lora.rank"]


def test_random_points_are_uniform_on_their_scale() -> None:
    each = dimension("optimizer.learning_rate", Parameter.model_validate(RATE))
    whole = dimension("lora.rank", Parameter.model_validate({"min": 1, "max": 4}))

    drawn = [random_point([each, whole], seed=0, number=number) for number in range(1000)]

    by_decade = [sum(-d - 1 <= math.log10(one[each.path]) < -d for one in drawn) for d in (4, 3, 2)]
    assert all(280 <= number <= 390 for number in by_decade)
    by_rank = [sum(one["lora.rank"] == rank for one in drawn) for rank in (1, 2, 3, 4)]
    assert all(200 <= number <= 300 for number in by_rank)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4, unique=True), min_size=1, max_size=4))
def test_grid_numbers_enumerate_the_combinations(values: list[list[int]]) -> None:
    paths = ["lora.rank", "max_steps", "seed", "lora.alpha"]
    dimensions = [dimension(p, Parameter.model_validate({"values": v})) for p, v in zip(paths, values, strict=False)]

    points = [tuple(grid_point(dimensions, number).items()) for number in range(grid_size(dimensions))]

    assert len(set(points)) == len(points) == math.prod(map(len, values))


def test_trial_is_the_base_request_with_its_parameters() -> None:
    design = design_of(
        lora={"alpha": 7.0}, suffix="try", parameters={"lora.rank": RANK, "optimizer.weight_decay": {"values": [0.1]}}
    )

    job = design.request_of(design.parameters_of(1))

    assert (job.lora.rank, job.lora.alpha, job.optimizer.weight_decay, job.suffix) == (8, 7.0, 0.1, "try")
    assert job.priority == "batch"
    assert job.seed == 1  # the seed of the sweep, so trials differ by their parameters alone


def test_method_hyperparameters_can_vary() -> None:
    fields = {"method": {"type": "dpo"}, "parameters": {"method.dpo.hyperparameters.beta": {"values": [0.1, 0.5]}}}

    _, other = checked(design_of(**fields))

    assert other.method_hyperparameters().model_dump()["beta"] == 0.5


@pytest.mark.parametrize(
    ("parameters", "param", "words"),
    [
        ({"lora.rnak": RANK}, "parameters.lora.rnak", "Did you mean 'lora.rank'"),
        ({"learning_rate": RATE}, "parameters.learning_rate", "'optimizer.learning_rate'"),
        ({"model": {"values": ["a", "b"]}}, "parameters.model", "the same base model"),
        ({"lora.rank": {"values": [8, 1000]}}, "parameters.lora.rank", "lora.rank = 1000"),
        ({"lora.rank": {"values": [8, "many"]}}, "parameters.lora.rank", "lora.rank = 'many'"),
        (
            {"lora.rank": {"values": [0, 8]}},
            "parameters.lora.rank",
            "in the trial with lora.rank = 0: 'lora.rank' must be at least 1.",
        ),
        (
            {"lora": {"values": [1, 2]}},
            "parameters.lora",
            "'lora' is a group of fields. Vary the fields in it, such as 'lora.",
        ),
        ({"lora": {"values": [{"rnk": 2}]}}, "parameters.lora", "there is no job field 'lora.rnk'. Remove 'lora.rnk'"),
        (
            {"optimizer.learning_rate": {"values": [1e-3, "x"]}},
            "parameters.optimizer.learning_rate",
            "= 'x': 'optimizer.learning_rate' must be a number or 'auto'.",
        ),
        ({"lr": RATE}, "parameters.lr", "Did you mean 'optimizer.learning_rate'?"),
        ({"dropuot": RATE}, "parameters.dropuot", "Did you mean 'lora.dropout'?"),
        ({"batch-size": RATE}, "parameters.batch-size", "hyperparameters.batch_size'?"),
        ({"optimizer.type": {"min": 0, "max": 1, "points": 2}}, "parameters.optimizer.type", "not a number"),
        ({"lora.rank": {"min": 1.5, "max": 4, "points": 2}}, "parameters.lora.rank", "from 1.5 to 4, but"),
        ({"optimizer.learning_rate": RATE}, "parameters.optimizer.learning_rate", "points"),
        (
            {"lora": {"values": [{}]}, "lora.rank": RANK},
            "parameters.lora.rank",
            "'lora' includes parameter 'lora.rank'",
        ),
        (
            {"lora.rank": {"min": 1, "max": 256, "points": 256}, "seed": {"values": list(range(5))}},
            "parameters",
            "1,280 combinations (256 by 5), but a sweep can have at most 1,000 trials",
        ),
        (
            {"lora.rank": {"min": 1, "max": 256, "points": 256}, "seed": {"values": list(range(5))}},
            "parameters",
            "trials, and remove 'points' from the ranges.",
        ),
        (
            {"optimizer.type": {"values": ["adamw", "sgd"]}, "optimizer.beta1": {"values": [0.5]}},
            "parameters.optimizer.type",
            "sgd has no beta1",
        ),
        (
            {"optimizer.type": {"values": ["adamw", "sgd"]}, "optimizer.beta1": {"values": [0.5]}},
            "parameters.optimizer.type",
            "Change 'optimizer.type' or 'optimizer.beta1' in 'parameters', or the related fields",
        ),
        ({"lora.rank": {"values": [0, 8]}}, "parameters.lora.rank", "Change 'lora.rank' in 'parameters'."),
        ({"lora.use_dora": {"values": [True, 1]}}, "parameters.lora.use_dora", "lora.use_dora = 1: "),
    ],
)
def test_invalid_parameters_are_rejected_by_name(parameters: Any, param: str, words: str) -> None:
    error = refused(parameters=parameters)

    assert error.param == param
    assert words in error.sentence()


def test_range_beyond_a_field_limit_is_rejected_even_if_not_drawn() -> None:
    error = refused(
        parameters={"lora.dropout": {"min": 0, "max": 0.95}}, search={"type": "random", "trials": 1, "seed": 0}
    )

    assert error.param == "parameters.lora.dropout"
    assert "0.95" in error.message


def test_metrics_without_the_required_file_or_method_are_rejected() -> None:
    assert refused(validation_file=None).code == "validation_file_required"
    assert refused(validation_file=None, parameters={"lora.rnak": RANK}).param == "parameters.lora.rnak"
    assert refused(objective={"metric": "valid_reward_margin"}).code == "metric_of_another_method"
    assert design_of(validation_file=None, objective={"metric": "train_loss"}).goal == "minimize"
    assert design_of(objective={"metric": "valid_mean_token_accuracy"}).goal == "maximize"


@pytest.mark.parametrize(
    "wrong",
    [
        {"search": {"type": "random"}},
        {"search": {"type": "grid", "trials": 4}},
        {"search": {"type": "random", "trials": 4, "reduction_factor": 2}},
        {"search": {"type": "ask_tell", "trials": 4}},
        {"parameters": {}},
        {"parameters": {"lora.rank": {"min": 1}}},
        {"parameters": {"lora.rank": {"values": [1], "min": 1, "max": 2}}},
        {"parameters": {"lora.rank": {"min": 2, "max": 2}}},
        {"parameters": {"lora.dropout": {"min": 0, "max": 1, "scale": "log"}}},
    ],
)
def test_options_of_another_search_type_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"remove it|number of trials|parameters|min|values"):
        sweep_request(**wrong)


# Rungs


def asha(**search: Any) -> Design:
    return design_of(search={"type": "asha", "trials": 4, "seed": 0, **search})


def rungs_of(fewest: int | None, *, search: dict[str, Any] | None = None, **fields: Any) -> Rungs:
    request = sweep_request(search={"type": "asha", "trials": 4, "seed": 0, **(search or {})}, **fields)
    return rungs(request.search, designed(request, seed=0), fewest)


def test_rungs_are_spaced_by_the_factor_and_exclude_the_last_step() -> None:
    three = Rungs(min_steps=10, reduction_factor=3)

    assert list(three.before(91)) == [10, 30, 90]
    assert list(three.before(90)) == [10, 30]
    assert three.at(30, num_steps=90) == 1
    assert three.at(90, num_steps=90) is None
    assert list(Rungs(min_steps=10, reduction_factor=3, max_rungs=1).before(1000)) == [10]


def test_trials_are_evaluated_at_every_rung() -> None:
    rule = rungs_of(270)
    design = asha()

    assert rule.min_steps == usual_min_steps(270, reduction_factor=3) == 10
    job = Design(**{**{name: getattr(design, name) for name in design.__slots__}, "rungs": rule}).request_of({})
    assert job.evaluation.every_steps == 10
    assert all(step % 10 == 0 for step in rule.before(270))


def test_unreachable_rungs_are_rejected() -> None:
    for fewest, search, fields, code in (
        (None, {}, {}, "min_steps_required"),
        (1000, {"min_steps": 15}, {"evaluation": {"every_steps": 10}}, "rung_without_evaluation"),
    ):
        with pytest.raises(InvalidRequest) as error:
            rungs_of(fewest, search=search, **fields)
        assert error.value.code == code
        assert code != "min_steps_required" or "data.overflow is 'split'" in error.value.message
    assert rungs_of(1000, evaluation={"every_steps": 10}).min_steps == 40
    assert fewest_steps(checked(asha()), num_rows=100) == 75


TRAIN_LONGER = "train for more steps (max_steps or n_epochs), or set search.type to 'random'"


@pytest.mark.parametrize(
    ("fewest", "search", "every_steps", "param", "remedy"),
    [
        (
            20,
            {"min_steps": 20},
            "auto",
            "search.min_steps",
            f"Set search.min_steps to less than 20, {TRAIN_LONGER} and remove search.min_steps.",
        ),
        (
            20,
            {"min_steps": 20, "max_rungs": 2},
            5,
            "search.min_steps",
            f"Set search.min_steps to less than 20 and to a multiple of 5, {TRAIN_LONGER} and remove search.min_steps "
            "and search.max_rungs.",
        ),
        (
            20,
            {"min_steps": 30},
            30,
            "search.min_steps",
            f"Set evaluation.every_steps and search.min_steps to less than 20, {TRAIN_LONGER} and remove "
            "search.min_steps.",
        ),
        (
            20,
            {},
            30,
            "evaluation.every_steps",
            f"Set evaluation.every_steps to less than 20, {TRAIN_LONGER}.",
        ),
        (1, {}, "auto", "search.type", f"T{TRAIN_LONGER[1:]}."),
        (1, {"min_steps": 2}, 2, "search.type", f"T{TRAIN_LONGER[1:]} and remove search.min_steps."),
    ],
)
def test_remedy_for_an_unreachable_rung_names_the_field_at_fault(
    fewest: int, search: dict[str, Any], every_steps: Any, param: str, remedy: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        rungs_of(fewest, search=search, evaluation={"every_steps": every_steps})

    assert (error.value.code, error.value.param) == ("no_rung_in_time", param)
    assert error.value.remedy == remedy


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=40),
    factor=st.integers(2, 6),
    maximizes=st.booleans(),
)
def test_rung_decision_equals_the_optuna_pruner(values: list[float], factor: int, maximizes: bool) -> None:
    direction = StudyDirection.MAXIMIZE if maximizes else StudyDirection.MINIMIZE
    rule = Rungs(min_steps=1, reduction_factor=factor)

    for number, value in enumerate(values):
        competing = values[: number + 1]
        num_better = sum(other > value if maximizes else other < value for other in competing)
        ours = rule.continues(num_better=num_better, num_competing=len(competing))
        assert ours == _is_trial_promotable_to_next_rung(value, list(competing), factor, direction)
