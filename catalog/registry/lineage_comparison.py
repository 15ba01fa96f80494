"""Compares a reproduction with the adapter that it reproduces, by their lineage records. Pure.

Equal digests prove equal bits. Different digests prove nothing about the quality of either adapter: the comparison
therefore also names the conditions on which the bits depend and that differ between the two trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from catalog.errors import listed
from catalog.registry import lineage
from catalog.tables.table import Json

WEIGHTS = "adapter_model.safetensors"
CONDITIONS = {
    "device": "the kind of device",
    "processor": "the processor",
    "dtype": "the precision",
    "quantization": "the quantization",
    "num_processes": "the number of trainer processes",
    "strategy": "how the devices hold the base model",
}
"""Facts in a trainer's report on which the bits of an adapter depend, with the name of each in a sentence."""


def expectation(record: Mapping[str, Any]) -> Json:
    """Return the digests that a reproduction must have: of the weights, and of the loss log. None: not recorded."""
    return {"weights": _weights(record), "loss_log": record.get("results", {}).get("loss_log")}


def compare(expected: Mapping[str, Any], *, recorded: Mapping[str, Any], reproduced: Mapping[str, Any]) -> Json:
    """Return the verdict on a reproduction.

    - `identical`: whether weights and loss log have the expected digests.
    - `reproduced`: the digests of the reproduction, as in `expectation`.
    - `differences`: `field`, `recorded` and `reproduced` of each condition that differs. A condition that changed
      during a training is a text with the first step of each value.
    - `machines`: for both trainings, the machine of each attempt that computed steps of the adapter: `attempt`,
      `worker`, `from_step` and its conditions.
    - `is_difference_expected`: whether equal bits were not promised. Always False for an identical adapter.
    - `message`: the verdict in sentences.

    expected: an `expectation`. recorded, reproduced: the two lineage records.
    """
    found = expectation(reproduced)
    unequal = [name for name in found if expected[name] is not None and found[name] != expected[name]]
    differences = list(_differences(recorded, reproduced))
    levels = [_determinism(record) for record in (recorded, reproduced)]
    is_expected = bool(unequal) and (bool(differences) or levels != ["bitwise", "bitwise"])
    return {
        "identical": not unequal,
        "reproduced": found,
        "differences": differences,
        "machines": {"recorded": _machines(recorded), "reproduced": _machines(reproduced)},
        "is_difference_expected": is_expected,
        "message": _message(unequal, differences, levels),
    }


def _weights(record: Mapping[str, Any]) -> str | None:
    files: list[Json] = record.get("outputs", {}).get("files", [])
    return next((file["digest"] for file in files if file["path"] == WEIGHTS), None)


def _determinism(record: Mapping[str, Any]) -> str | None:
    return record.get("results", {}).get("determinism")


def _differences(recorded: Mapping[str, Any], reproduced: Mapping[str, Any]) -> Iterator[Json]:
    """Yield the conditions that both records name, with different values."""
    before, now = dict(_conditions(recorded)), dict(_conditions(reproduced))
    for field, value in before.items():
        if field in now and now[field] != value:
            yield {"field": field, "recorded": value, "reproduced": now[field]}


def _conditions(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the trainers' conditions, of the versions, and of the tokenized files."""
    trained = _trained(record)
    yield from _over_steps([(step, _facts(_machine(attempt))) for step, attempt in trained])
    code: Json = record.get("code") or {}
    earlier = [(step, _versions(_machine(attempt).get("versions") or {})) for step, attempt in trained]
    yield from _over_steps([*earlier[:-1], (trained[-1][0], _versions(code))])
    sources: list[Json] = record.get("data") or []
    yield from ((f"tokens of the {source['role']} file", source["tokens"]) for source in sources)


def _trained(record: Mapping[str, Any]) -> list[tuple[int, Json]]:
    """Return the attempts that computed steps of the adapter, each with the step from which it continued."""
    attempts: list[Json] = record.get("attempts") or [{}]
    resumed = [(attempt.get("resumed_from_step"), _machine(attempt)) for attempt in attempts]
    return [(resumed[index][0] or 0, attempts[index]) for index in lineage.contributing(resumed)]


def _machines(record: Mapping[str, Any]) -> list[Json]:
    return [
        {"attempt": attempt.get("number"), "worker": attempt.get("worker"), "from_step": step}
        | _facts(_machine(attempt))
        for step, attempt in _trained(record)
    ]


def _machine(attempt: Json) -> Json:
    """Return the report of the attempt's trainer; empty if the trainer was never ready."""
    return attempt.get("machine") or {}


def _facts(machine: Json) -> Json:
    return {field: machine[field] for field in CONDITIONS if machine.get(field) is not None}


def _versions(code: Mapping[str, str]) -> Json:
    return {f"version of {package}": version for package, version in sorted(code.items())}


def _over_steps(parts: Sequence[tuple[int, Json]]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each fact. parts: the facts of each attempt, with its first step."""
    for name in dict.fromkeys(name for _, facts in parts for name in facts):
        values = [(step, facts[name]) for step, facts in parts if name in facts]
        changes = [values[0], *(now for before, now in pairwise(values) if now[1] != before[1])]
        is_constant = len(changes) == 1
        yield name, changes[0][1] if is_constant else ", ".join(f"{value} from step {step}" for step, value in changes)


def _message(unequal: list[str], differences: list[Json], levels: list[str | None]) -> str:
    if not unequal:
        return "The reproduction is identical: its weights and its losses have the recorded SHA-256 digests."
    parts = listed([{"weights": "weights", "loss_log": "losses"}[name] for name in unequal])
    differs = f"The reproduction differs: its {parts} do not have the recorded SHA-256 digests."
    reasons = [f"{_named(each['field'])} differs" for each in differences]
    if levels != ["bitwise", "bitwise"]:
        level = next(level for level in levels if level != "bitwise")
        reasons.append(f"the determinism level is {level or 'unknown'}, not bitwise")
    if not reasons:
        return (
            f"{differs} A difference is not expected: both trainings report the determinism level bitwise, the same "
            "device and the same versions."
        )
    return f"{differs} A difference is expected: {listed(reasons)}."


def _named(field: str) -> str:
    return CONDITIONS.get(field) or f"the {field}"
