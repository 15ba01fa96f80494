# pyright: strict
"""Which module paths a name, a pattern or a layer's number means: PEFT's rules. No torch here.

A pattern of a stranger may take for ever (a+)+$; each match is bounded in time, and refused past it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import regex

REGEX_PREFIX = "re:"
MATCH_SECONDS = 0.1
"""Of one pattern on one module path. A sound pattern takes microseconds."""
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")

Value = TypeVar("Value")


class PatternTooSlow(Exception):
    """The pattern took longer than MATCH_SECONDS on one path."""


def matches(path: str, suffix: str) -> bool:
    """Whether `suffix` is the path, or its end after a dot."""
    return path == suffix or path.endswith(f".{suffix}")


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether the whole path matches the regular expression. Raises PatternTooSlow."""
    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise PatternTooSlow(pattern) from error


def pattern_value(path: str, patterns: Sequence[tuple[str, Value]], default: Value) -> Value:
    """The value of the first key that matches the path, or its end after a dot, as PEFT reads rank_pattern."""
    return next((value for key, value in patterns if matches_pattern(path, end_pattern(key))), default)


def end_pattern(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"


def layer_of(path: str) -> int | None:
    """The number of the block that a module is in: 3 of model.layers.3.mlp.up_proj."""
    found = LAYER.match(path)
    return int(found[1]) if found else None


def grouped_by_layer(shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Paths that differ in the block's number alone, and their [out, in], as one: "*" stands for each of `layers`.

    A few lines for a model of any depth. `layers` is None for a path that is in no block.
    """
    groups: dict[tuple[str, tuple[int, int]], list[int] | None] = {}
    for path, shape in shapes.items():
        found = LAYER.match(path)
        if found is None:
            groups[path, shape] = None
        else:
            starred = f"{path[: found.start(1)]}*{path[found.end(1) :]}"
            layers = groups.setdefault((starred, shape), [])
            assert layers is not None
            layers.append(int(found[1]))
    return [{"path": path, "shape": list(shape), "layers": layers} for (path, shape), layers in groups.items()]


def compiles(pattern: str) -> bool:
    """Whether both the bounded engine and the one that PEFT uses can read the pattern."""
    try:
        regex.compile(pattern)
        re.compile(pattern)
    except (regex.error, re.error, RecursionError, OverflowError):
        return False
    return True
