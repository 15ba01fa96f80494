"""Selects the linear layers of a base model that a job's adapter targets.

The rules are PEFT's. lora_core.base_model.patching implements them too, because the API server has no torch; a test
compares both. Patterns come from users, so all matching of one submission has a time limit. No pattern is matched in a
write transaction; see catalog/admission/target_layers.py.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import regex

from catalog import write_guard
from catalog.errors import InvalidRequest, listed
from catalog.spec.lora import LoraSpec

MATCH_SECONDS = 0.1
"""Maximum processor time, in seconds, for all patterns of a submission on all layers. Usual ones take milliseconds."""
MAX_LISTED = 12
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")

Value = TypeVar("Value", int, float)
Description = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer. `path`: of the module in the base model."""

    path: str
    out_features: int
    in_features: int

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def smaller_size(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def layer(self) -> int | None:
        """The number of its block; None if it is in no block."""
        found = LAYER.match(self.path)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    linear: Linear
    rank: int


def linears_of(description: Description) -> list[Linear]:
    """Return all linear layers that an adapter may target. `description`: of the base model, by lora_core."""
    return [
        Linear(path=path, out_features=group["shape"][0], in_features=group["shape"][1])
        for group in description.get("linear_paths", ())
        for path in _paths(group)
    ]


class Matcher:
    """Matches patterns with paths, each pair once, within MATCH_SECONDS of processor time in total."""

    def __init__(self) -> None:
        self._left = MATCH_SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._known: dict[tuple[str, str], bool] = {}

    def matches(self, expression: str, path: str, param: str) -> bool:
        """Return whether the whole path matches. Raises InvalidRequest when the time is used up."""
        write_guard.check_outside("matching a pattern")
        known = self._known.get((expression, path))
        if known is None:
            known = self._known[expression, path] = self._match(expression, path, param)
        return known

    def _match(self, expression: str, path: str, param: str) -> bool:
        began = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            if expression not in self._compiled:
                self._compiled[expression] = regex.compile(expression)
            return self._compiled[expression].fullmatch(path, timeout=self._left) is not None
        except TimeoutError as error:
            raise InvalidRequest("pattern_too_slow", field=param, match_seconds=MATCH_SECONDS, param=param) from error
        finally:
            self._left -= time.thread_time() - began


def adapted(description: Description, lora: LoraSpec, *, base_name: str, matcher: Matcher) -> list[Adapted]:
    """Return the layers that `lora` targets, with their ranks.

    `matcher`: several configurations may share it, and then also its time. Raises InvalidRequest for a name, a number
    or a pattern that matches nothing, and for two keys of a pattern that set different values for one layer.
    """
    linears = linears_of(description)
    if not linears:
        raise InvalidRequest("no_target_modules", base_name=base_name, param="model")
    chosen = _in_layers(_targeted(linears, lora, matcher, base_name), lora.layers_to_transform, base_name)
    paths = [linear.path for linear in chosen]
    ranks = _values(paths, lora.rank_pattern, lora.rank, matcher, "lora.rank_pattern")
    _values(paths, lora.alpha_pattern, lora.alpha, matcher, "lora.alpha_pattern")
    if lora.begins_with_the_base:
        _check_ranks(chosen, ranks, lora)
    return [Adapted(linear=linear, rank=rank) for linear, rank in zip(chosen, ranks, strict=True)]


def _paths(group: Mapping[str, Any]) -> list[str]:
    path, layers = group["path"], group["layers"]
    return [path] if layers is None else [path.replace("*", str(layer), 1) for layer in layers]


def _targeted(linears: list[Linear], lora: LoraSpec, matcher: Matcher, base_name: str) -> list[Linear]:
    wanted, expression = lora.target_modules, lora.target_expression
    if wanted == "all-linear":
        return linears
    if expression is not None:
        found = [linear for linear in linears if matcher.matches(expression, linear.path, "lora.target_modules")]
        if not found:
            raise InvalidRequest(
                "target_expression_without_match",
                expression=expression,
                base=base_name,
                path=linears[-1].path,
                names=_existing(linears),
                param="lora.target_modules",
            )
        return found
    names = [wanted] if isinstance(wanted, str) else wanted
    missing = [name for name in names if not any(_ends(linear.path, name) for linear in linears)]
    if missing:
        raise InvalidRequest(
            "unknown_target_modules",
            base=base_name,
            missing=_shortened(missing),
            nearest=_nearest(missing, sorted({linear.name for linear in linears})),
            names=_existing(linears),
            param="lora.target_modules",
        )
    return [linear for linear in linears if any(_ends(linear.path, name) for name in names)]


def _in_layers(linears: list[Linear], layers: list[int] | None, base_name: str) -> list[Linear]:
    if layers is None:
        return linears
    existing = sorted({linear.layer for linear in linears if linear.layer is not None})
    missing = [layer for layer in layers if layer not in existing]
    if missing:
        if existing:
            raise InvalidRequest(
                "unknown_layers",
                base_name=base_name,
                missing=_shortened(missing),
                span=_span(existing),
                param="lora.layers_to_transform",
            )
        raise InvalidRequest(
            "no_layers", base_name=base_name, missing=_shortened(missing), param="lora.layers_to_transform"
        )
    return [linear for linear in linears if linear.layer in layers]


def _values(paths: list[str], pattern: Mapping[str, Value], usual: Value, matcher: Matcher, param: str) -> list[Value]:
    """Return the value of each path."""
    matched: set[str] = set()
    values: list[Value] = []
    for path in paths:
        keys = [key for key in pattern if matcher.matches(rf"(?:.*\.)?(?:{key})", path, param)]
        matched.update(keys)
        if len({pattern[key] for key in keys}) > 1:
            raise _ambiguous(path, {key: pattern[key] for key in keys}, param)
        values.append(pattern[keys[0]] if keys else usual)
    unknown = [key for key in pattern if key not in matched]
    if unknown:
        names = sorted({path.rpartition(".")[2] for path in paths})
        keys = listed([repr(key) for key in unknown])
        raise InvalidRequest(
            "unknown_pattern_key" if len(unknown) == 1 else "unknown_pattern_keys",
            keys=keys,
            field=param,
            nearest=_nearest(unknown, names),
            names=", ".join(names),
            paths=paths[-1],
            param=param,
        )
    return values


def _check_ranks(linears: list[Linear], ranks: list[int], lora: LoraSpec) -> None:
    above = above_limit([Adapted(linear=linear, rank=rank) for linear, rank in zip(linears, ranks, strict=True)])
    if not above:
        return
    linear, rank, also = above[0].linear, above[0].rank, other_layers(above)
    name = "ranks_too_high"
    if len(above) == 1:
        name = "rank_too_high"
    elif any(layer.rank != lora.rank for layer in above):  # lora.rank alone does not determine them
        name = "pattern_ranks_too_high"
    raise InvalidRequest(
        name,
        init=str(lora.init_lora_weights),
        limit=linear.smaller_size,
        path=linear.path,
        out_features=linear.out_features,
        in_features=linear.in_features,
        rank=rank,
        also=also,
        lowest=lowest_limit(above),
        names=names_of(above),
        param="lora.rank" if rank == lora.rank else "lora.rank_pattern",
    )


def above_limit(layers: Sequence[Adapted]) -> list[Adapted]:
    """Return the layers whose rank exceeds their smaller dimension."""
    return [layer for layer in layers if layer.rank > layer.linear.smaller_size]


def other_layers(above: Sequence[Adapted]) -> str:
    """Return a sentence about all layers but the first, which has been named; empty if there is no other."""
    if len(above) == 1:
        return ""
    names = _shortened(sorted({layer.linear.name for layer in above[1:]}))
    return f" This also applies to {len(above) - 1} other layer{'' if len(above) == 2 else 's'} ({names})."


def lowest_limit(above: Sequence[Adapted]) -> int:
    return min(layer.linear.smaller_size for layer in above)


def names_of(layers: Sequence[Adapted]) -> str:
    return listed(sorted({layer.linear.name for layer in layers}))


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _ambiguous(path: str, values: Mapping[str, float], param: str) -> InvalidRequest:
    shown = [f"{value:g} (key {key!r})" for key, value in sorted(values.items())]
    return InvalidRequest("ambiguous_pattern", field=param, path=path, settings=listed(shown), param=param)


def _nearest(wanted: list[str], names: Sequence[str]) -> str:
    similar = [match for name in wanted for match in difflib.get_close_matches(name.rpartition(".")[2], names, n=1)]
    return f"Did you mean {', '.join(dict.fromkeys(similar))}? " if similar else ""


def _existing(layers: list[Linear]) -> str:
    names = sorted({layer.name for layer in layers})
    return _shortened(names)


def _shortened(items: Sequence[object]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return f"{', '.join(map(str, items[:MAX_LISTED]))}{more}"


def _span(numbers: list[int]) -> str:
    """Return 'block numbers from 0 to 31', or a list of all numbers if there are gaps."""
    if len(numbers) == 1:
        return f"block number {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"block numbers from {numbers[0]} to {numbers[-1]}"
    return f"block numbers from this list: {', '.join(map(str, numbers))}"
