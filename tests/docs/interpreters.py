"""A shell and a Python interpreter that run the blocks of a page one after another, as a reader would.

Progress bars and warnings of Python libraries are on stderr, and no page shows them.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Self

PYTHON_LOOP = """
import sys
variables = {"__name__": "__main__"}
for line in sys.stdin:
    path, end = line.split()
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), variables)
    print(end, flush=True)
"""


class Failed(AssertionError):
    """A block failed."""


class Interpreter:
    """A process that runs one file after another. It exits at the first failure."""

    def __init__(
        self, argv: list[str], line: str, *, folder: Path, env: Mapping[str, str], errors: Path | None = None
    ) -> None:
        """line: the input that runs {path} and then prints {end}. errors: a file for stderr (default: with stdout)."""
        self._line = line
        self._errors = errors
        with errors.open("wb") if errors is not None else nullcontext(subprocess.STDOUT) as stderr:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=folder,
                env=env,
                text=True,
                errors="replace",
                start_new_session=True,
            )

    def run(self, path: Path) -> str:
        """Return the output of the file. Raises Failed with the output of the process if it exits."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        end = secrets.token_hex(16)
        self._process.stdin.write(self._line.format(path=path, end=end))
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line.rstrip("\n").endswith(end):
                return "".join((*printed, line.rstrip("\n").removesuffix(end)))
            printed.append(line)
        more = self._errors.read_text("utf-8", "replace") if self._errors is not None else ""
        raise Failed(f"exit code {self._process.wait()}:\n{''.join(printed)}{more}")

    def close(self) -> None:
        """Kill the process, and the processes that a block left in the background."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


class PageSession:
    """The shell of a page, and a Python interpreter that starts with the shell's exported variables and folder."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        self._blocks = folder.parent / "blocks"
        self._blocks.mkdir()
        line = "source {path} < /dev/null; echo {end}\n"
        self._shell = Interpreter(["bash", "-e"], line, folder=folder, env=env)
        self._python: Interpreter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shell.close()
        if self._python is not None:
            self._python.close()

    def run(self, language: str, text: str) -> str:
        path = self._blocks / f"{secrets.token_hex(4)}.{'py' if language == 'python' else 'sh'}"
        path.write_text(text, "utf-8")
        if language == "sh":
            return self._shell.run(path)
        if self._python is None:
            self._python = self._start_python()
        return self._python.run(path)

    def _start_python(self) -> Interpreter:
        saved, cwd = self._blocks / "env", self._blocks / "pwd"
        self.run("sh", f"env -0 > {saved}; pwd > {cwd}\n")
        env = dict(entry.split("=", 1) for entry in saved.read_text().split("\0") if entry)
        argv = [sys.executable, "-c", PYTHON_LOOP]
        folder = Path(cwd.read_text().rstrip("\n"))
        return Interpreter(argv, "{path} {end}\n", folder=folder, env=env, errors=self._blocks / "errors")


def environment(home: Path, root: Path) -> dict[str, str]:
    """Return the environment of a new user on this machine, without variables of Lorry, OpenAI and Python."""
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LORRY_", "OPENAI_", "PYTHON", "PYTEST"))
    }
    return {
        **mine,
        "HOME": str(home),
        "LORRY_DATA_DIR": str(home / ".lorry"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }
