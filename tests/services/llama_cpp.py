"""llama.cpp, from a wheel on PyPI, in a virtual environment of its own in the cache of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.services.programs import CACHE, Missing, one_at_a_time

PACKAGE = "llama-cpp-py-sync"
FOLDER = CACHE / "llama-cpp"
PROGRAM = Path(__file__).with_name("llama_cpp_program.py")
SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """Results of llama.cpp: the ids of each text, and the logits of each position of the given ids."""

    tokens: list[list[int]]
    logits: list[list[float]]


def python(folder: Path = FOLDER) -> Path:
    """Return the Python of an environment in which llama.cpp loads, which is created if necessary. Raises Missing."""
    path = folder / "bin" / "python"
    with one_at_a_time():
        if not path.exists():
            venv.create(folder, symlinks=True, with_pip=True)
        if not _loads(path):
            _run([str(path), "-m", "pip", "install", "-q", PACKAGE])
    if not _loads(path):
        raise Missing(f"the wheel {PACKAGE} was installed, but llama.cpp does not load")
    return path


def compute(
    model: Path, *, work: Path, ids: Sequence[int], lora: Path | None = None, texts: Sequence[str] = ()
) -> Computed:
    """Run llama.cpp on one sequence. work: a folder for files. Raises Missing, and AssertionError if it fails."""
    work.mkdir(parents=True, exist_ok=True)
    arguments, result = work / "arguments.json", work / "result.json"
    arguments.write_text(
        json.dumps({"model": str(model), "lora": None if lora is None else str(lora), "ids": [*ids], "texts": [*texts]})
    )
    done = subprocess.run(
        [str(python()), str(PROGRAM), str(arguments), str(result)],
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    content = json.loads(result.read_text())
    return Computed(tokens=content["tokens"], logits=content["logits"])


def _loads(path: Path) -> bool:
    check = "from llama_cpp_py_sync._cffi_bindings import get_lib; get_lib().llama_backend_init()"
    return path.exists() and subprocess.run([str(path), "-c", check], capture_output=True, check=False).returncode == 0


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        raise Missing(f"`{' '.join(argv)}` failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
