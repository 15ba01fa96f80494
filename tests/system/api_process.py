"""The API server as a separate process on a data folder, and the real openai client for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).parents[2]


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
    given = {} if pepper is None else {"LORRY_PEPPER": pepper}
    environment = {
        **os.environ,
        "LORRY_DATA_DIR": str(data_dir),
        "OMP_NUM_THREADS": "1",
        "LORRY_SHUTDOWN_SECONDS": "100",
        **given,
    }
    command = [sys.executable, "-m", "api", "--log-level", "warning"]

    def run_json(*arguments: str) -> Any:
        made = subprocess.run(
            [*command, *arguments, "--json"], env=environment, cwd=ROOT, capture_output=True, check=True, timeout=250
        )
        return json.loads(made.stdout)

    key = run_json("bootstrap")["api_key"] or run_json("new-key")["api_key"]
    with subprocess.Popen(
        [*command, "serve", "--port", "0"], env=environment, cwd=ROOT, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        try:
            yield Service(url=json.loads(child.stdout.readline())["url"], key=key)
        finally:
            child.send_signal(signal.SIGTERM)
        assert child.wait(250) == 0
