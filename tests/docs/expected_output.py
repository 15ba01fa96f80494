"""Compares the output that a page shows with the output that its commands printed.

The pages show the output of a real model, but the test trains a tiny one. Therefore these match any text of their kind:

- `…`: alone on a line, any number of lines; within a line, with the letters after it, any text;
- numbers, sizes and durations;
- IDs and digests.

Runs of spaces are equal, because columns are as wide as their longest cell.
"""

from __future__ import annotations

import re

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
NUMBER = r"(?:(?<![\w-])-)?\d[\d.,:]*(?:e[-+]?\d+)?"
TOKENS = re.compile(
    rf"(?P<id>[0-9a-f]{{8,}}\b)"
    rf"|(?P<size>{NUMBER} [kMGT]?B\b)"
    rf"|(?P<duration>{NUMBER} (?:ms|s|min|h)\b)"
    rf"|(?P<number>{NUMBER})"
    r"|(?P<bar>[#━]{2,})"
    r"|(?P<space> +)"
    r"|(?P<any>…\w*)"
)
PATTERNS = {
    "id": "[0-9a-f]{8,}",
    "size": rf"{NUMBER} [kMGT]?B",
    "duration": rf"{NUMBER} (?:ms|s|min|h)",
    "number": NUMBER,
    "bar": "[#━]+",
    "space": " +",
    "any": r"[^\n]*",
}


def matches(expected: str, actual: str) -> bool:
    return re.fullmatch(_pattern(expected), _clean(actual)) is not None


def _clean(text: str) -> str:
    lines = ANSI.sub("", text).strip("\n").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _pattern(expected: str) -> str:
    return "".join(
        r"(?:[^\n]*\n)*?" if line.strip() == "…" else rf"{_line(line)}\n" for line in _clean(expected).splitlines()
    )


def _line(line: str) -> str:
    found, end = [], 0
    for token in TOKENS.finditer(line):
        kind = token.lastgroup
        assert kind is not None
        found += [re.escape(line[end : token.start()]), PATTERNS[kind]]
        end = token.end()
    return "".join((*found, re.escape(line[end:])))
