"""`python -m tests.benchmarks.hidden_packages MODULE ARGUMENTS`: runs a module as if some packages were missing."""

from __future__ import annotations

import runpy
import sys
from typing import Any

HIDDEN = {
    *("sqlalchemy", "pydantic", "pydantic_core", "psycopg", "gguf", "trl", "fastapi", "datasets", "bitsandbytes"),
    "pytest",
    *("api", "catalog", "lorry", "worker"),
}
"""Packages that a machine with torch, Triton, transformers, PEFT and accelerate may lack. The kit is copied to it
without the other packages of this project."""


class HidingFinder:
    """Finds what `finder` finds, except hidden packages."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def main() -> None:
    already = HIDDEN & sys.modules.keys()
    assert not already, f"imported before they were hidden: {already}"
    sys.meta_path[:] = [HidingFinder(finder) for finder in sys.meta_path]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
