"""Builds a real data set from the running Python: a function's signature, and the first sentence of its docstring.

    python examples/python_docstrings.py TRAIN.jsonl HELD_OUT.jsonl

The files are chat JSONL with the same bytes on the same Python. Each module goes to one file. So no function
of the validation file has a similar function of its module in the training file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

TRAIN_ROWS = 600
HELD_OUT_ROWS = 56
HELD_OUT_PART = 8
"""One module in HELD_OUT_PART goes to the validation file."""
MOST_PER_MODULE = 24
LONGEST_QUESTION_CHARS = 130
ANSWER_CHARS = range(16, 121)
_IMPORT_SECONDS = 60

_OF_THIS_MACHINE = (" at 0x", "environ(", sys.prefix, sys.base_prefix, sys.executable)

SKIPPED = frozenset(
    # On import, these open a browser or a window, print, need a display, or are missing on some machines.
    {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "ensurepip", "distutils"}
    | {"pydoc_data", "msilib", "winreg", "nt", "ntpath", "__main__", "sitecustomize", "usercustomize"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A public function of the standard library. `call` is its name with its signature."""

    module: str
    call: str
    sentence: str

    def question(self) -> str:
        return f"In one sentence: what does `{self.call}` do?"

    def row(self) -> dict[str, object]:
        messages = [("user", self.question()), ("assistant", self.sentence)]
        return {"messages": [{"role": role, "content": content} for role, content in messages]}


def build(train: Path, held_out: Path) -> tuple[list[Function], list[Function]]:
    """Write both files, and return the functions in them."""
    functions = harvest()
    to_train = [f for f in functions if not is_held_out(f.module)]
    known = {f.sentence for f in to_train}
    to_hold_out = [f for f in functions if is_held_out(f.module) and f.sentence not in known]
    parts = _sample(to_train, TRAIN_ROWS), _sample(to_hold_out, HELD_OUT_ROWS)
    for path, part in zip((train, held_out), parts, strict=True):
        write(path, part)
    return parts


def write(path: Path, functions: Iterable[Function]) -> None:
    """Write one row for each function, as chat JSONL."""
    path.write_text("".join(json.dumps(f.row(), ensure_ascii=False) + "\n" for f in functions), "utf-8")


def harvest() -> list[Function]:
    """Import every module in a child process, which keeps the side effects of imports."""
    argv = [sys.executable, "-I", __file__, "--list"]
    listed = subprocess.run(argv, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=True)
    return [Function(**json.loads(line)) for line in listed.stdout.splitlines()]


def is_held_out(module: str) -> bool:
    """Decide by the name of the top-level module only, so that every machine decides the same."""
    name = module.split(".", maxsplit=1)[0]
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_PART == 0


def functions_of(name: str, module: ModuleType) -> Iterator[Function]:
    """Yield the public functions defined in `module` by name, at most MOST_PER_MODULE."""
    found = 0
    for attribute in sorted(vars(module)):
        thing = vars(module)[attribute]
        if attribute.startswith("_") or not inspect.isroutine(thing) or getattr(thing, "__module__", None) != name:
            continue
        function = _described(name, attribute, thing)
        if function is not None and found < MOST_PER_MODULE:
            found += 1
            yield function


def first_sentence(docstring: str) -> str:
    """Return the first sentence of the first paragraph, on one line, without reStructuredText markup."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z(`'\"])", paragraph)[0]
    return re.sub(r"``?([^`]*)``?|:[a-z]+:`([^`]*)`", r"\1\2", sentence).strip()


def _described(module: str, attribute: str, thing: object) -> Function | None:
    """Return None if there is no signature, or no sentence of an allowed length."""
    try:
        signature = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None
    call = f"{module}.{attribute}{signature}"
    sentence = first_sentence(inspect.getdoc(thing) or "")
    is_sentence = sentence.endswith(".") and sentence[:1].isupper() and len(sentence) in ANSWER_CHARS
    if not is_sentence or len(call) > LONGEST_QUESTION_CHARS or any(text in call for text in _OF_THIS_MACHINE):
        return None
    return Function(module=module, call=call, sentence=sentence)


def _sample(functions: list[Function], most: int) -> list[Function]:
    """Return at most `most` functions in a fixed order that mixes the modules, each sentence once."""
    once = {f.sentence: f for f in functions}.values()
    return sorted(once, key=lambda f: hashlib.sha256(f.call.encode()).digest())[:most]


def _module_names() -> Iterable[str]:
    """Yield the public modules of the standard library and their public submodules, sorted."""
    import pkgutil

    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if name.startswith("_"):
            continue
        yield name
        spec = _spec(name)
        for sub in sorted(m.name for m in pkgutil.iter_modules(spec or [])):
            if not sub.startswith("_") and sub not in SKIPPED and not sub.startswith("test"):
                yield f"{name}.{sub}"


def _spec(name: str) -> list[str] | None:
    import importlib.util

    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else None


def _list() -> None:
    """In the child process: print one JSON line per function. The output of modules goes to stderr."""
    import importlib
    import os
    import warnings

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for name in _module_names():
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit):  # noqa: BLE001, S112 - a module for another system
            continue
        for f in functions_of(name, module):
            out.write(json.dumps({"module": f.module, "call": f.call, "sentence": f.sentence}) + "\n")
    out.flush()
    os._exit(0)  # skips the exit handlers that modules registered


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        _list()
    train_rows, held_out_rows = build(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{len(train_rows)} training rows, {len(held_out_rows)} validation rows")
