# pyright: strict
"""Match module paths by name, regular expression or layer number, as PEFT does. Does not import torch.

Patterns come from untrusted users and can backtrack exponentially, such as (a+)+$. Each match has a time limit.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import regex

REGEX_PREFIX = "re:"
MATCH_SECONDS = 0.1
"""Time limit for one pattern on one module path. A well-behaved pattern takes microseconds."""
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")

Value = TypeVar("Value")


class PatternTooSlow(Exception):
    """The pattern took longer than MATCH_SECONDS on one path."""


def matches(path: str, suffix: str) -> bool:
    """Return whether `suffix` is the whole path or follows a dot in it."""
    return path == suffix or path.endswith(f".{suffix}")


def matches_pattern(path: str, pattern: str) -> bool:
    """Return whether the regular expression matches the whole path. Raises PatternTooSlow."""
    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise PatternTooSlow(pattern) from error


def pattern_value(path: str, patterns: Sequence[tuple[str, Value]], default: Value) -> Value:
    """Return the value of the first matching key, or `default`.

    A key matches the whole path or its end after a dot, as in PEFT's rank_pattern. Raises PatternTooSlow.
    """
    return next((value for key, value in patterns if matches_pattern(path, end_pattern(key))), default)


def end_pattern(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"


def layer_of(path: str) -> int | None:
    """Return the number of the module's block, such as 3 for model.layers.3.mlp.up_proj. None outside blocks."""
    found = LAYER.match(path)
    return int(found[1]) if found else None


def grouped_by_layer(shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Group module paths that differ only in the block number and have the same shape [out, in].

    In each result "*" stands for the numbers in `layers`, so the list stays short for a model of any depth.
    `layers` is None for a path outside blocks.
    """
    groups: dict[tuple[str, tuple[int, int]], list[int] | None] = {}
    for path, shape in shapes.items():
        found = LAYER.match(path)
        if found is None:
            groups[path, shape] = None
        else:
            pattern = f"{path[: found.start(1)]}*{path[found.end(1) :]}"
            layers = groups.setdefault((pattern, shape), [])
            assert layers is not None
            layers.append(int(found[1]))
    return [{"path": path, "shape": list(shape), "layers": layers} for (path, shape), layers in groups.items()]


def compiles(pattern: str) -> bool:
    """Return whether both `regex`, which has a time limit, and `re`, which PEFT uses, can compile the pattern."""
    try:
        regex.compile(pattern)
        re.compile(pattern)
    except (regex.error, re.error, RecursionError, OverflowError):
        return False
    return True
