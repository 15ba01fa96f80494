"""Errors of the API that name the option of `lorry jobs submit` in place of the field."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorry.cli.parsing.job_options import OPTIONS, flag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorry.errors import APIError

NAMES = {
    "model": "MODEL",
    "training_file": "TRAIN",
    **{path.replace("METHOD", method): flag(path) for path in OPTIONS for method in OPTIONS["method.type"]["choices"]},
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
