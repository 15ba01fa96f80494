"""The shipped Python sources, parsed for the tests in this directory."""

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
    """A module of the project. `name` is its path relative to the root, with slashes."""

    name: str

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    def place(self, node: ast.expr | ast.stmt) -> str:
        """Return the location of a node, for the output of a test."""
        return f"{self.name}:{node.lineno}"


def source_files(*packages: str) -> Iterator[SourceFile]:
    """Yield the modules of the given packages, or of all packages."""
    for package in packages or PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield SourceFile(path.relative_to(ROOT).as_posix())


def dotted(node: ast.expr) -> str:
    """Return the dotted form of a name or attribute, such as `a.b.c`, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""
