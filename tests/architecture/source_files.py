"""The shipped Python sources, read and parsed, for the tests beside this file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "catalog", "worker", "lora_core", "lorry", "migrations")


@dataclass(frozen=True)
class SourceFile:
    """One of our modules. `name` is its path below the root, with slashes."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    def place(self, node: ast.expr | ast.stmt) -> str:
        """Where a test should point at."""
        return f"{self.name}:{node.lineno}"


def source_files(*packages: str) -> Iterator[SourceFile]:
    """Every module of the packages; of all of them if none is named."""
    for package in packages or PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield SourceFile(path.relative_to(ROOT).as_posix())


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""
