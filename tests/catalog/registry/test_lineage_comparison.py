"""The comparison of a reproduction with the recorded adapter: the verdict, and the conditions that differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from catalog.registry.lineage_comparison import compare, expectation
from tests.catalog.registry.test_lineage import digest, record


def recorded() -> dict[str, Any]:
    found = record()
    found["results"] |= {"loss_log": digest("losses"), "determinism": "bitwise"}
    found["attempts"][-1]["machine"] |= {"processor": "Xeon", "strategy": "replicated"}
    return found


def verdict(reproduced: dict[str, Any], expected: dict[str, Any] | None = None) -> dict[str, Any]:
    original = recorded()
    return compare(expected or expectation(original), recorded=original, reproduced=reproduced)


def with_weights(found: dict[str, Any], text: str) -> dict[str, Any]:
    (weights,) = [file for file in found["outputs"]["files"] if file["path"] == "adapter_model.safetensors"]
    weights["digest"] = digest(text)
    return found


def test_equal_digests_are_identical_whatever_else_differs() -> None:
    again = recorded()
    again["job"], again["people"]["started_at"] = "ftjob-2", "2030-01-01T00:00:00.000Z"

    found = verdict(again)

    assert (found["identical"], found["is_difference_expected"], found["differences"]) == (True, False, [])
    assert found["reproduced"] == {"weights": digest("weights"), "loss_log": digest("losses")}
    assert "identical" in found["message"]


@pytest.mark.parametrize("part", ["weights", "loss_log"])
def test_one_other_digit_is_a_difference_that_is_not_expected(part: str) -> None:
    expected = expectation(recorded())
    expected[part] = expected[part][:-1] + ("0" if expected[part][-1] != "0" else "1")

    found = verdict(recorded(), expected)

    assert (found["identical"], found["is_difference_expected"]) == (False, False)
    named = {"weights": "weights", "loss_log": "losses"}[part]
    assert f"its {named} do not have the recorded SHA-256 digests" in found["message"]
    assert "A difference is not expected" in found["message"]


def test_other_hardware_and_versions_are_named_and_make_a_difference_expected() -> None:
    again = with_weights(recorded(), "other weights")
    again["attempts"][-1]["machine"] |= {"processor": "EPYC"}
    again["code"] |= {"torch": "2.10.0"}

    found = verdict(again)

    assert (found["identical"], found["is_difference_expected"]) == (False, True)
    assert found["differences"] == [
        {"field": "processor", "recorded": "Xeon", "reproduced": "EPYC"},
        {"field": "version of torch", "recorded": "2.9.0", "reproduced": "2.10.0"},
    ]
    assert found["message"].endswith("expected: the processor differs and the version of torch differs.")


@pytest.mark.parametrize("level", ["allclose", None])
def test_without_bitwise_determinism_a_difference_is_expected(level: str | None) -> None:
    again = with_weights(recorded(), "other weights")
    again["results"]["determinism"] = level

    found = verdict(again)

    assert (found["identical"], found["is_difference_expected"]) == (False, True)
    assert f"the determinism level is {level or 'unknown'}, not bitwise" in found["message"]


def test_conditions_that_an_older_record_lacks_are_not_differences() -> None:
    original, again = recorded(), recorded()
    del original["attempts"][-1]["machine"]["processor"]
    expected = copy.deepcopy(expectation(original)) | {"loss_log": None}
    again["results"]["loss_log"] = digest("other losses")

    found = compare(expected, recorded=original, reproduced=again)

    assert (found["identical"], found["differences"]) == (True, [])


def test_machines_of_all_attempts_with_steps_of_the_adapter_are_compared() -> None:
    original, again = recorded(), with_weights(recorded(), "other weights")
    first, last = again["attempts"]
    first["machine"] = {**last["machine"], "processor": "EPYC", "versions": {"torch": "2.8.0"}}
    first["worker"], last["resumed_from_step"] = "w9", 40
    original["attempts"][0]["machine"] = {**last["machine"], "versions": {"torch": "2.9.0"}}

    found = compare(expectation(original), recorded=original, reproduced=again)

    assert found["differences"] == [
        {"field": "processor", "recorded": "Xeon", "reproduced": "EPYC from step 0, Xeon from step 40"},
        {"field": "version of torch", "recorded": "2.9.0", "reproduced": "2.8.0 from step 0, 2.9.0 from step 40"},
    ]
    assert found["is_difference_expected"]
    conditions = {"device": "cpu", "dtype": "bfloat16", "strategy": "replicated"}
    assert found["machines"]["reproduced"] == [
        {"attempt": 1, "worker": "w9", "from_step": 0, "processor": "EPYC", **conditions},
        {"attempt": 2, "worker": "w2", "from_step": 40, "processor": "Xeon", **conditions},
    ]
    assert [machine["from_step"] for machine in found["machines"]["recorded"]] == [0, 50]


def test_machine_whose_steps_were_discarded_is_not_compared() -> None:
    again = recorded()
    again["attempts"][0]["machine"] = {**again["attempts"][1]["machine"], "processor": "EPYC"}
    again["attempts"][1]["resumed_from_step"] = 0

    found = verdict(again)

    assert found["differences"] == []
    assert [machine["worker"] for machine in found["machines"]["reproduced"]] == ["w2"]
