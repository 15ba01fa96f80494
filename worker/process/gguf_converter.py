"""Runs llama.cpp's convert_hf_to_gguf.py, which writes GGUF files of architectures that Lorry itself does not write.

It runs with the worker's Python, in the sandbox of an export and with the environment of a child.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from catalog.errors import UnfitWorker
from catalog.processes import how_it_exited
from worker.process import sandbox
from worker.process.confined_child import confined
from worker.process.launcher import child_environment

SHOWN_BYTES = 4096
"""Length of the end of its output, in which the last line is searched."""
OUT_OF_MEMORY = re.compile(r"^[\w.]*MemoryError\b|can't allocate memory|not enough memory")
"""The last line of an error of Python, NumPy or torch."""
MODULES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules that it imports only for some tokenizers, and the packages that contain them. Workers have the others."""


class ConverterFailed(Exception):
    """The converter failed. The text is the last line of its output."""


def check(script: Path, *, scratch: Path) -> None:
    """Check that the converter runs on this worker. Raises UnfitWorker. scratch: an existing folder."""
    if any(folder.is_relative_to(script.resolve().parent) for folder in (Path.home(), scratch.resolve())):
        raise UnfitWorker("converter_in_private_folder", script=str(script))
    missing = [package for module, package in MODULES.items() if not _is_installed(module)]
    if missing:
        raise UnfitWorker("converter_lacks_packages", script=str(script), packages=" ".join(missing))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            run(script, "--help", work=Path(folder), source=Path(folder))
        except ConverterFailed as error:
            raise UnfitWorker("converter_fails", script=str(script), name=script.name, reason=str(error)) from error


def run(script: Path, *arguments: str, work: Path, source: Path) -> None:
    """Run the converter on a model folder. It writes only in `work`. The kernel kills it when the calling thread ends.

    Raises ConverterFailed, MemoryError if it needs more memory than its limit or was killed, and OSError.
    """
    box = sandbox.export(work, base_dir=source, converter=script)
    alone = {"TMPDIR": str(work.absolute()), "HF_HUB_OFFLINE": "1", "HF_HOME": str(work.absolute() / "hub")}
    with tempfile.TemporaryFile(dir=work) as output:
        done = subprocess.run(
            confined([sys.executable, str(script.resolve()), *arguments], box),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment() | alone,
            check=False,
        )
        output.seek(max(0, output.tell() - SHOWN_BYTES))
        lines = output.read().decode(errors="replace").split("\n")
    last_line = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    if done.returncode == 0:
        return
    sys.stderr.write("\n".join(lines))  # into the log of the export
    if done.returncode == -signal.SIGKILL or OUT_OF_MEMORY.search(last_line):
        raise MemoryError
    if done.returncode < 0:
        raise ConverterFailed(f"it {how_it_exited(done.returncode)}")
    raise ConverterFailed(last_line.rstrip("."))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that contains it
        return False
