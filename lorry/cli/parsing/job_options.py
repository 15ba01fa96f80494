"""The options of `lorry jobs submit`, `lorry plans create` and `lorry sweeps run` that set a field of a job.

`make docs` writes job_options.json from the service's definition of a job: path, type and help of each option. This
module has the names that differ from the field's.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorry.cli.app import parameters_of, set_parameters
from lorry.cli.parsing.durations import UNITS
from lorry.cli.parsing.option_values import json_or_text, pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

ARGUMENTS, ADAPTER, TRAINING, EVALUATION, RUN = "Arguments", "Adapter", "Training", "Evaluation and checkpoints", "Job"
NUMBERS = "method.METHOD.hyperparameters"
"""The path of a method's hyperparameters; METHOD stands for its name."""
NAMES = {
    "parent_adapter": "parent",
    "lora.use_rslora": "rslora",
    "lora.use_dora": "dora",
    "lora.target_modules": "target",
    "lora.layers_to_transform": "layer",
    "lora.init_lora_weights": "init",
    "optimizer.type": "optimizer",
    "schedule.type": "schedule",
    "schedule.warmup_ratio": "warmup",
    "schedule.decay_ratio": "decay",
    "method.type": "method",
    f"{NUMBERS}.n_epochs": "epochs",
    "evaluation.every_steps": "evaluate_every",
    "checkpoint_every_steps": "checkpoint_every",
    "validation_file": "valid",
    "tags": "tag",
}
"""Names of options that differ from the last part of the field's path."""
PANELS = {
    "parent_adapter": ADAPTER,
    "lora": ADAPTER,
    "evaluation": EVALUATION,
    "early_stopping": EVALUATION,
    "checkpoint_every_steps": EVALUATION,
    "validation_file": EVALUATION,
    **dict.fromkeys(("suffix", "must_serve_on", "priority", "deadline", "metadata", "tags"), RUN),
}
"""The part of the help, by the first part of the field's path; TRAINING for others."""
HELP = {
    "parent_adapter": "Continue this adapter, by name, ID or suffix. Rank and targets are taken from it.",
    "validation_file": "Validation file: a path or the ID of an uploaded file.",
    "deadline": "Time by which the job should finish: 12h from now, or a local time such as 2026-12-01T08:00.",
}
"""Help of options that accept more than their field."""
METAVARS = {
    "parent_adapter": "ADAPTER",
    "lora.target_modules": "NAME",
    "must_serve_on": "ENDPOINT",
    "deadline": "WHEN",
    "integer list": "NUMBER",
    "string list": "TEXT",
    "string map": "KEY=VALUE",
    "integer map": "KEY=NUMBER",
    "number map": "KEY=NUMBER",
}
"""The value of an option in its help, by path or by type."""
TYPES: Mapping[str, Any] = {
    "integer": int,
    "number": float,
    "boolean": bool,
    "string": str,
    "integer list": list[int],
    "string list": list[str],
    **dict.fromkeys(("integer map", "number map", "string map"), list[str]),
}
OPTIONS: Mapping[str, Mapping[str, Any]] = json.loads(Path(__file__).with_name("job_options.json").read_text("utf-8"))
"""Type and help of each option, by the path of its field."""


def name_of(path: str) -> str:
    """Return the name of the option's parameter."""
    return NAMES.get(path) or path.rpartition(".")[2]


FIELDS = {name_of(path): path for path in OPTIONS}
"""The field that each option sets, by the name of its parameter."""


def flag(path: str) -> str:
    return f"--{name_of(path).replace('_', '-')}"


def option(panel: str, help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


def with_job_options(*paths: str, before: str, panel: str | None = None) -> Callable[[Any], Any]:
    """Return a decorator that replaces `**fields` of a command by the options of these fields, or of all.

    before: the parameter that they precede. panel: the part of the help, if not that of the field.
    """

    def extend(function: Callable[..., Any]) -> Callable[..., Any]:
        fixed = [one for one in parameters_of(function) if one.kind is not one.VAR_KEYWORD]
        position = [one.name for one in fixed].index(before)
        set_parameters(function, [*fixed[:position], *_parameters(paths or OPTIONS, panel), *fixed[position:]])
        return function

    return extend


def _parameters(paths: Iterable[str], panel: str | None) -> list[inspect.Parameter]:
    """Return the options, by part of the help: it shows the parts in the order of their first option."""
    by_panel = {path: panel or PANELS.get(path.partition(".")[0], TRAINING) for path in paths}
    order = (panel, ADAPTER, TRAINING, EVALUATION, RUN)
    return [_parameter(path, by_panel[path]) for path in sorted(by_panel, key=lambda path: order.index(by_panel[path]))]


def _parameter(path: str, panel: str) -> inspect.Parameter:
    given = OPTIONS[path]
    is_flag = given["type"] == "boolean"
    kind: Any = Literal[tuple(given["choices"])] if "choices" in given else TYPES[given["type"]]
    kind = str if path == "deadline" else kind
    help_text = (HELP.get(path) or given["help"]) + " Repeatable." * given["type"].endswith(("list", "map"))
    names = (flag(path), "--lr") if path == "optimizer.learning_rate" else (flag(path),)
    made = option(panel, help_text, *names, metavar=METAVARS.get(path) or METAVARS.get(given["type"]))
    return inspect.Parameter(
        name_of(path),
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_flag else None,
        annotation=Annotated[kind if is_flag else kind | None, made],
    )


def given_fields(params: Mapping[str, Any], paths: Iterable[str] = tuple(OPTIONS)) -> dict[str, Any]:
    """Return the values of the passed options by dotted path. paths: the fields that have options."""
    method = params["method"] or "supervised"
    given = ((path, params[name_of(path)]) for path in paths)
    return {path.replace("METHOD", method): _value(path, value) for path, value in given if is_given(value)}


def is_given(value: object) -> bool:
    """Whether the option was passed; a zero is a value."""
    return value is not None and value is not False and value not in ([], ())


def _value(path: str, given: Any) -> Any:
    """Return the value of an option in the form of the API."""
    kind = OPTIONS[path]["type"]
    if path == "deadline":
        return _moment(given)
    if kind == "string map":
        return _by_key([pair(entry, flag(path), "KEY=VALUE") for entry in given], flag(path))
    if kind.endswith(" map"):
        return _by_key([_number_entry(entry, flag(path)) for entry in given], flag(path))
    if path == "lora.target_modules" and len(given) == 1 and (given[0] == "all-linear" or given[0].startswith("re:")):
        return given[0]
    return given


def _moment(given: str) -> int:
    """Seconds since 1970."""
    if match := re.fullmatch(r"(\d+)([smhd])", given):
        return int(time.time()) + int(match[1]) * UNITS[match[2]]
    try:
        return int(datetime.fromisoformat(given).timestamp())
    except ValueError:
        raise typer.BadParameter(
            f"{given!r} is not a time. Use 12h, or 2026-12-01T08:00.", param_hint="--deadline"
        ) from None


def _by_key(pairs: Sequence[tuple[str, Any]], option: str) -> dict[str, Any]:
    """Return the pairs as a mapping. Rejects two values for one key."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise typer.BadParameter(f"{key!r} was passed twice. Pass it only once.", param_hint=option)
        found[key] = value
    return found


def _number_entry(given: str, option: str) -> tuple[str, Any]:
    """Split at the last "=", because a key may contain "=" itself, as (?=…) does."""
    key, equals, value = given.rpartition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{given!r} is not in the form KEY=NUMBER.", param_hint=option)
    return key, json_or_text(value)
