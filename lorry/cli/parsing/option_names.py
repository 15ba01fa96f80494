"""The option of `lorry jobs submit` for each field of the API, and errors that name the option."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorry.cli.parsing.option_values import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorry.errors import APIError

NUMBERS = "method.METHOD.hyperparameters"
"""The path of a method's hyperparameters; METHOD stands for its name."""
FIELDS = {
    "parent": "parent_adapter",
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "rslora": "lora.use_rslora",
    "dropout": "lora.dropout",
    "target": "lora.target_modules",
    "layer": "lora.layers_to_transform",
    "rank_pattern": "lora.rank_pattern",
    "alpha_pattern": "lora.alpha_pattern",
    "dora": "lora.use_dora",
    "optimizer": "optimizer.type",
    "init": "lora.init_lora_weights",
    "learning_rate": "optimizer.learning_rate",
    "lora_plus_ratio": "optimizer.lora_plus_ratio",
    "weight_decay": "optimizer.weight_decay",
    "schedule": "schedule.type",
    "warmup": "schedule.warmup_ratio",
    "decay": "schedule.decay_ratio",
    "method": "method.type",
    "epochs": f"{NUMBERS}.n_epochs",
    "batch_size": f"{NUMBERS}.batch_size",
    "beta": f"{NUMBERS}.beta",
    "gamma": f"{NUMBERS}.gamma",
    "label_smoothing": f"{NUMBERS}.label_smoothing",
    "neftune_alpha": f"{NUMBERS}.neftune_alpha",
    "loss": "data.loss",
    "overflow": "data.overflow",
    "max_steps": "max_steps",
    "max_length": "max_length",
    "precision": "precision",
    "quantization": "quantization",
    "seed": "seed",
    "evaluate_every": "evaluation.every_steps",
    "keep": "evaluation.keep",
    "patience": "early_stopping.patience",
    "checkpoint_every": "checkpoint_every_steps",
    "suffix": "suffix",
    "must_serve_on": "must_serve_on",
    "priority": "priority",
    "deadline": "deadline",
}
"""The field that each option sets, by the option's name in `submit`."""
NAMES = {
    "model": "MODEL",
    "training_file": "TRAIN",
    "validation_file": "--valid",
    "metadata": "--metadata",
    "tags": "--tag",
    **{
        path.replace("METHOD", method): f"--{name.replace('_', '-')}"
        for name, path in FIELDS.items()
        for method in Method
    },
}
"""The argument or option that sets each field."""


def use_option_names(error: APIError, typed: Mapping[str, str]) -> None:
    """Make an error name the option instead of the field. typed: the option that set each field, by dotted path."""
    names = {"validation_file": NAMES["validation_file"], "method.type": NAMES["method.type"]}
    if error.param:
        name = _name_of(error.param, typed)
        names[error.param], error.param = name, name
    error.message, error.remedy = _with_option_names(error.message, names), _with_option_names(error.remedy, names)


def _name_of(param: str, typed: Mapping[str, str]) -> str:
    """Return the option that set the field or an object that contains it; else the options that set fields in it."""
    for path, name in [*typed.items(), *NAMES.items()]:
        if param == path or param.startswith(f"{path}."):
            return name
    inside = [name for path, name in typed.items() if path.startswith(f"{param}.")]
    return ", ".join(inside) or param


def _with_option_names(text: str, names: Mapping[str, str]) -> str:
    """Replace field names that are in quotes or that can't be ordinary words.

    One pass replaces all, because the name of an option may contain the name of its field.
    """
    if not names:
        return text
    patterns = [_pattern(field) for field in sorted(names, key=len, reverse=True)]
    return re.sub("|".join(patterns), lambda found: names[found[0].strip("'")], text)


def _pattern(field: str) -> str:
    name = re.escape(field)
    is_identifier = "_" in field or "." in field
    return f"'{name}'" + (rf"|(?<![\w.'-]){name}(?![\w'-]|\.\w)" if is_identifier else "")
