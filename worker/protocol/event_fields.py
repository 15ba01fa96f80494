"""The types of the fields of a trainer's events; mailbox.py lists the fields of each event.

A trainer may be compromised, so the worker checks each value before it uses it in a calculation, a statement of the
database or a report. An event has the same types whatever its type is. Unknown fields are not checked, and not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

from catalog.resources.memory import ElementwiseKernels

LARGEST_INTEGER = 2**63 - 1
"""Maximum of an integer in the database."""
Check = Callable[[Any], bool]


def wrong_field(event: Mapping[str, Any]) -> str | None:
    """Return the name of a field whose value has a wrong type. None if there is none."""
    return next((name for name, value in event.items() if name in CHECKS and not CHECKS[name](value)), None)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value  # PostgreSQL stores no NUL characters


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST_INTEGER


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, cast(list[Any], value)))


def _object_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, cast(dict[str, Any], value).values()))


def _object(**checks: Check) -> Check:
    """Return the check of an object that has at least these fields."""
    return lambda value: (
        isinstance(value, dict) and all(name in value and check(value[name]) for name, check in checks.items())
    )


def _is_kernels(value: Any) -> bool:
    return value in get_args(ElementwiseKernels)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(cast(list[Any], value)) == 2 and all(map(_is_finite, cast(list[Any], value)))


CHECKS: dict[str, Check] = {
    **dict.fromkeys(
        ("claim_id", "request_id", "device", "processor", "dtype", "quantization", "invariance", "strategy"), _is_text
    ),
    **dict.fromkeys(("folder", "adapter", "stopped_early"), _optional(_is_text)),
    **dict.fromkeys(("pid", "num_threads", "num_processes", "step", "num_steps", "num_parameters"), _is_integer),
    **dict.fromkeys(("num_tokens", "num_supervised_tokens", "kept_step", "trained_tokens"), _is_integer),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), _is_integer),
    **dict.fromkeys(("base_bytes", "adapter_bytes", "peak_bytes", "cached_bytes"), _is_integer),
    "good_step": _optional(_is_integer),
    **dict.fromkeys(("load_seconds", "probe_seconds", "tokens_per_second", "steps_per_epoch"), _is_finite),
    **dict.fromkeys(("loss", "learning_rate", "grad_norm", "token_accuracy"), _is_number),
    **dict.fromkeys(("verifying", "is_checkpoint"), _is_flag),
    "elementwise_kernels": _is_kernels,
    "error": _object(code=_is_text, message=_is_text, remedy=_is_text),
    "memory": _object_of(_is_integer),
    "versions": _object_of(_is_text),
    "rewards": _optional(_object_of(_optional(_is_number))),
    "report": _object(),
    "generation": _object(),
    "ranks": _list_of(_is_integer),
    "samples": _list_of(_object()),
    "spans": _list_of(_object(name=_is_text, began_at=_is_finite, ended_at=_is_finite)),
    "deltas": _list_of(_object(index=_is_integer, text=_is_string, num_tokens=_is_integer)),
    "tick_speeds": _object_of(_list_of(_is_pair)),
}
