"""The API server as a separate process on a data folder, and the real openai client for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "api", "--log-level", "warning"]
EXIT_SECONDS = 250


@contextmanager
def api_server(*, log: Path | None = None, **environment: str) -> Iterator[str]:
    """Serve on a free port during the block, and stop gracefully. Yields the URL.

    log: a file for the log, which otherwise goes to that of this process. environment: variables of the process.
    """
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with Path(os.devnull if log is None else log).open("wb") as file:
        errors = None if log is None else file
        child = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0"], env=given, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors
        )
    with child:
        assert child.stdout is not None
        try:
            yield json.loads(child.stdout.readline())["url"]
        finally:
            child.terminate()
        assert child.wait(EXIT_SECONDS) == 0, "the API server did not exit with status 0"


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running API server, and an operator key for it."""

    url: str
    key: str

    def client(self, **given: Any) -> openai.OpenAI:
        """Return a strict client: a response that violates the schema raises an error."""
        options: dict[str, Any] = {"_strict_response_validation": True, "max_retries": 2, **given}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, **options)


@contextmanager
def api_process(data_dir: Path, *, pepper: str | None = None) -> Iterator[Service]:
    """Bootstrap the folder, serve it on a free port, and stop it gracefully.

    pepper: the pepper of the keys in its database, or None if there are no keys.
    """
    environment = {"LORRY_DATA_DIR": str(data_dir), "LORRY_SHUTDOWN_SECONDS": "100"}
    environment |= {} if pepper is None else {"LORRY_PEPPER": pepper}

    def run_json(*arguments: str) -> Any:
        argv, given = [*COMMAND, *arguments, "--json"], os.environ | environment
        made = subprocess.run(argv, env=given, cwd=ROOT, capture_output=True, check=True, timeout=250)
        return json.loads(made.stdout)

    key = run_json("bootstrap")["api_key"] or run_json("new-key")["api_key"]
    with api_server(log=None, **environment) as url:
        yield Service(url=url, key=key)
