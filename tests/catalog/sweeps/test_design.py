"""Sweep designs without a database: grids, checks of parameters, and rungs."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import InvalidRequest
from catalog.spec.sweep import SweepRequest
from catalog.sweeps.design import Design, checked, designed, rungs

RATE = {"min": 1e-5, "max": 1e-2, "scale": "log"}
RANK = {"values": [4, 8, 16]}
LARGE = {"lora.rank": {"min": 1, "max": 256, "points": 256}, "seed": {"values": list(range(5))}}
SGD = {"optimizer.type": {"values": ["adamw", "sgd"]}, "optimizer.beta1": {"values": [0.5]}}


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
        "lora.rank": {"min": 1, "max": 4, "points": 9},
        "optimizer.learning_rate": {**RATE, "points": 4},
        "lora.use_dora": {"values": [True, False]},
    }
    design = design_of(parameters=parameters)

    made = [tuple(each.items()) for each in design.parameters_of(range(design.num_trials))]

    assert design.num_trials == len(set(made)) == 4 * 4 * 2
    assert [dict(each)["optimizer.learning_rate"] for each in made[:8:2]] == [1e-5, 1e-4, 1e-3, 1e-2]
    assert dict(made[-1]) == {"lora.rank": 4, "optimizer.learning_rate": 1e-2, "lora.use_dora": False}


def test_trial_is_the_base_request_with_its_parameters() -> None:
    varied = {"lora.rank": RANK, "optimizer.weight_decay": {"values": [0.1]}}
    design = design_of(lora={"alpha": 7.0}, suffix="try", parameters=varied)

    job = checked(design)[1]

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
        ({"lora.rnak": RANK}, "lora.rnak", "Did you mean 'lora.rank'"),
        ({"learning_rate": RATE}, "learning_rate", "'optimizer.learning_rate'"),
        ({"lr": RATE}, "lr", "Did you mean 'optimizer.learning_rate'?"),
        ({"dropuot": RATE}, "dropuot", "Did you mean 'lora.dropout'?"),
        ({"batch-size": RATE}, "batch-size", "hyperparameters.batch_size'?"),
        ({"model": {"values": ["a", "b"]}}, "model", "the same base model"),
        ({"lora.rank": {"values": [8, "many"]}}, "lora.rank", "lora.rank = 'many'"),
        ({"lora.rank": {"values": [0]}}, "lora.rank", "the trial with lora.rank = 0: 'lora.rank' must be at least 1."),
        ({"lora.rank": {"values": [0]}}, "lora.rank", "Change 'lora.rank' in 'parameters'."),
        ({"lora": {"values": [1, 2]}}, "lora", "'lora' is a group of fields. Vary the fields in it, such as 'lora."),
        ({"lora": {"values": [{"rnk": 2}]}}, "lora", "there is no job field 'lora.rnk'. Remove 'lora.rnk'"),
        ({"lora.use_dora": {"values": [True, 1]}}, "lora.use_dora", "lora.use_dora = 1: "),
        ({"optimizer.type": {"min": 0, "max": 1, "points": 2}}, "optimizer.type", "not a number"),
        ({"lora.rank": {"min": 1.5, "max": 4, "points": 2}}, "lora.rank", "from 1.5 to 4, but"),
        ({"optimizer.learning_rate": RATE}, "optimizer.learning_rate", "points"),
        ({"lora": {"values": [{}]}, "lora.rank": RANK}, "lora.rank", "'lora' includes parameter 'lora.rank'"),
        (LARGE, None, "1,280 combinations (256 by 5), but a sweep can have at most 1,000 trials"),
        (LARGE, None, "trials, and remove 'points' from the ranges."),
        (SGD, "optimizer.type", "sgd has no beta1"),
        (SGD, "optimizer.type", "Change 'optimizer.type' or 'optimizer.beta1' in 'parameters', or the related fields"),
    ],
)
def test_invalid_parameters_are_rejected_by_name(parameters: Any, param: str | None, words: str) -> None:
    error = refused(parameters=parameters)

    assert error.param == (f"parameters.{param}" if param else "parameters")
    assert words in error.sentence()


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_limits_and_values_are_checked_even_if_not_drawn(search: str) -> None:
    few = {"type": search, "trials": 1, "seed": 0}
    invalid = {"lora.dropout": {"min": 0, "max": 0.95}}, {"lora.rank": {"min": 1, "max": 1e6}}
    if search == "tpe":
        invalid += ({"lora.rank": {"values": [4] * 100 + [1000]}},)

    for parameters in invalid:
        assert refused(parameters=parameters, search=few).param == f"parameters.{next(iter(parameters))}"


def test_metrics_without_the_required_file_or_method_are_rejected() -> None:
    assert refused(validation_file=None).code == "missing_required_parameter"
    assert refused(validation_file=None, parameters={"lora.rnak": RANK}).param == "parameters.lora.rnak"
    assert refused(objective={"metric": "valid_reward_margin"}).code == "conflicting_value"
    assert len(checked(design_of(validation_file=None, objective={"metric": "train_loss"}))) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"search": {"type": "random"}},
        {"search": {"type": "grid", "trials": 4}},
        {"search": {"type": "random", "trials": 4, "reduction_factor": 2}},
        {"search": {"type": "tpe", "trials": 4, "min_steps": 2}},
        {"parameters": {}},
        {"parameters": {"lora.rank": {"min": 1}}},
        {"parameters": {"lora.rank": {"values": [1], "min": 1, "max": 2}}},
        {"parameters": {"lora.rank": {"min": 2, "max": 2}}},
        {"parameters": {"lora.dropout": {"min": 0, "max": 1, "scale": "log"}}},
    ],
)
def test_contradictory_searches_and_parameters_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"remove it|set their number|parameters|min|values"):
        sweep_request(**wrong)


# Rungs


def rungs_of(max_steps: int, *, every_steps: Any = "auto", **search: Any) -> Any:
    fields: dict[str, Any] = {"evaluation": {"every_steps": every_steps}, "max_steps": max_steps}
    design = design_of(search={"type": "asha", "trials": 4, **search}, **fields)
    return rungs(design, checked(design), num_rows=10_000)


def test_three_rungs_come_before_the_end_of_the_shortest_trial() -> None:
    assert rungs_of(270) == {"min_steps": 10, "reduction_factor": 3}
    assert rungs_of(8, reduction_factor=2) == {"min_steps": 1, "reduction_factor": 2}
    assert rungs_of(5) == {"min_steps": 1, "reduction_factor": 3}


def test_first_rung_is_at_an_evaluation() -> None:
    assert rungs_of(1000, min_steps=15, every_steps=10)["min_steps"] == 20

    design = design_of(search={"type": "asha", "trials": 1}, max_steps=270)
    with_rungs = Design(**{**{name: getattr(design, name) for name in design.__slots__}, "rungs": {"min_steps": 10}})
    assert with_rungs.request_of({}).evaluation.every_steps == 10


def test_unreachable_rungs_are_rejected() -> None:
    for fields, param in (
        ({"min_steps": 20}, "search.min_steps"),
        ({"min_steps": 5, "every_steps": 30}, "search.min_steps"),
        ({"every_steps": 30}, "search"),
    ):
        with pytest.raises(InvalidRequest, match="the shortest trial ends at step 20") as error:
            rungs_of(20, **fields)
        assert (error.value.code, error.value.param) == ("conflicting_value", param)
    design = design_of(search={"type": "grid", "pruner": "asha"}, data={"overflow": "split"})
    with pytest.raises(InvalidRequest, match=r"data\.overflow is 'split'") as error:
        rungs(design, checked(design), num_rows=100)
    assert error.value.code == "conflicting_value"


def test_evaluation_interval_cannot_vary_with_a_pruner() -> None:
    varied = {"evaluation.every_steps": {"values": [5, 10]}}

    assert refused(parameters=varied, search={"type": "asha", "trials": 2}).code == "invalid_value"
