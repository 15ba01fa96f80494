"""The syntax of a sweep's parameters: `lora.rank=4,8,16`, `optimizer.learning_rate=1e-5..1e-3:log`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lorry.cli.parsing.job_options import FIELDS
from lorry.cli.parsing.option_values import json_or_text, pair

if TYPE_CHECKING:
    from collections.abc import Mapping

OTHER_NAMES = {"lr": "learning_rate"}
"""Short names of options, and the names that FIELDS has."""
FORM = "FIELD=A,B,C or FIELD=LOW..HIGH[:log][:POINTS]"


def parameter(given: str) -> tuple[str, dict[str, Any]]:
    """Return the field's path and its values or range. A list in brackets is JSON, for values that contain commas."""
    path, text = pair(given, "--over", FORM)
    if text.startswith("["):
        values = json_or_text(text)
        if not isinstance(values, list):
            raise typer.BadParameter(f"{text!r} is not a JSON list.", param_hint="--over")
        return path, {"values": values}
    if ".." in text:
        return path, _range(given, text)
    return path, {"values": [json_or_text(part.strip()) for part in text.split(",")]}


def _range(given: str, text: str) -> dict[str, Any]:
    limits, *more = text.split(":")
    low, _, high = limits.partition("..")
    try:
        space: dict[str, Any] = {"min": _number(low), "max": _number(high)}
        for option in more:
            space |= {"scale": option} if option in ("log", "linear") else {"points": int(option)}
    except ValueError:
        raise typer.BadParameter(f"{given!r} is not in the form {FORM}.", param_hint="--over") from None
    return space


def _number(text: str) -> float:
    return int(text) if text.strip().lstrip("-").isdigit() else float(text)


def check_space(varied: Mapping[str, Mapping[str, Any]], *, kind: str, method: str) -> None:
    """Reject invalid spaces without a request, so that no file is uploaded for them."""
    for path, space in varied.items():
        name = path.lstrip("-").replace("-", "_")
        field = FIELDS.get(OTHER_NAMES.get(name, name), path).replace("METHOD", method)
        has_objects = any(isinstance(value, dict) for value in space.get("values", ()))
        if field != path and not has_objects:
            raise typer.BadParameter(f"{path!r} is not a field of a job. Use --over {field}=…", param_hint="--over")
        if kind == "grid" and "min" in space and "points" not in space:
            raise typer.BadParameter(
                f"a grid needs the number of points of a range, such as 8: --over {path}={_typed(space)}:8. "
                "Or sample from the range with --random or --tpe, and --trials.",
                param_hint="--over",
            )


def _typed(space: Mapping[str, Any]) -> str:
    """Return a range in the syntax of --over, without its points."""
    return f"{space['min']:g}..{space['max']:g}" + (f":{space['scale']}" if "scale" in space else "")


def search_of(random: bool, tpe: bool, asha: bool, **numbers: int | None) -> dict[str, Any]:
    """Return the search of a sweep; a grid by default."""
    if random and tpe:
        raise typer.BadParameter("--random and --tpe can't be combined.", param_hint="--tpe")
    kind = "tpe" if tpe else "asha" if asha else "random" if random else "grid"
    if kind != "grid" and numbers["trials"] is None:
        raise typer.BadParameter(f"--{kind} needs the number of trials, such as --trials 20.", param_hint="--trials")
    for name, number in numbers.items():
        is_used = {"trials": kind != "grid", "seed": True}.get(name, asha)
        if number is not None and not is_used:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(
                f"{option} does not apply to a {kind} sweep. Remove it, or add --asha.", param_hint=option
            )
    pruner = {"pruner": "asha"} if tpe and asha else {}
    return {"type": kind, **pruner, **{name: number for name, number in numbers.items() if number is not None}}
