"""Compares a reproduction with the adapter that it reproduces, by their lineage records. Pure.

Equal digests prove equal bits. Different digests prove nothing about the quality of either adapter: the comparison
therefore also names the conditions on which the bits depend and that differ between the two trainings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from catalog.errors import listed
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
    - `differences`: `field`, `recorded` and `reproduced` of each condition that differs.
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
    """Yield (name, value) of the last trainer's conditions, of the versions, and of the tokenized files."""
    attempts: list[Json] = record.get("attempts") or [{}]
    machine: Json = attempts[-1].get("machine") or {}
    yield from ((field, machine[field]) for field in CONDITIONS if machine.get(field) is not None)
    code: Json = record.get("code") or {}
    yield from ((f"version of {package}", version) for package, version in sorted(code.items()))
    sources: list[Json] = record.get("data") or []
    yield from ((f"tokens of the {source['role']} file", source["tokens"]) for source in sources)


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
