"""An open run of a tracker, from the worker's side: a child process that is killed if it does not answer in time.

Credentials come from the worker's environment by an allow-list. Only this child gets them, and never a trainer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from catalog.settings import Settings
from catalog.spec.integrations import INTEGRATION_TYPES
from worker.process.launcher import CREDENTIAL_NAMES, PROXIES, ROOT, SYSTEM

Json = dict[str, Any]
LIBRARIES = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboardX"}
PASSED_ON = {"wandb": ("WANDB_",), "mlflow": ("MLFLOW_",), "tensorboard": ()}
"""Prefixes of the environment variables that a tracker's child gets in addition to the system's."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "true"}
"""Disables the telemetry of libraries, unless the operator enables it."""
PASSWORD_IN_ADDRESS = re.compile(r"(://)[^\s/@]+(?=@)")
ANSWER_SECONDS = 90.0
CLOSE_SECONDS = 10.0
MAX_PROBLEM = 300


class TrackerRunFailed(Exception):
    """The tracker, or its library, reported an error, which is the text."""


def available(settings: Settings) -> tuple[str, ...]:
    """Return the tracker types that this worker can write: their libraries are installed. Imports none of them. W&B
    also needs a key or its offline mode."""
    wanted = settings.named_integrations()
    found = [name for name in INTEGRATION_TYPES if name in wanted and find_spec(LIBRARIES[name]) is not None]
    has_account = "WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") == "offline"
    return tuple(name for name in found if name != "wandb" or has_account)


def places(settings: Settings) -> dict[str, str]:
    """Return where each tracker writes to, as the operator has configured it."""
    return {
        "mlflow": settings.resolved_mlflow_tracking_uri(),
        "tensorboard": str(settings.tensorboard_dir or settings.data_dir / "tensorboard"),
        "wandb": str(settings.data_dir / "wandb"),
    }


class TrackerRunSession:
    """An open run. Only `kill` may be called by other threads."""

    def __init__(self, opening: Json, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        """Open the run. Raises TrackerRunFailed."""
        self._answer_seconds = answer_seconds
        self._environment = _environment(opening["type"])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.children.tracker.main"],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            self.run_id = str(self._ask(opening)["run_id"])
        except TrackerRunFailed:
            self.close()
            raise

    def write(self, points: list[Json], end: Json | None) -> None:
        """Write points. end: of the job, if it has ended. Raises TrackerRunFailed."""
        self._ask({"points": points, "end": end})

    def close(self) -> None:
        """Close the run so that it keeps its points, within a time limit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(CLOSE_SECONDS)
        self.kill()
        self._process.wait()
        self._process.stdout.close()

    def kill(self) -> None:
        """Kill the child and all processes that its library has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, message: Json) -> Json:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(self._answer_seconds, self.kill)
        watch.start()
        try:
            with suppress(OSError):  # the child has exited: its last line may contain the reason
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise TrackerRunFailed("its process exited, or did not answer in time.")
        answer: Json = json.loads(line)
        if "error" in answer:
            raise TrackerRunFailed(self._without_secrets(str(answer["error"])))
        return answer

    def _without_secrets(self, text: str) -> str:
        for name, value in self._environment.items():
            if CREDENTIAL_NAMES.search(name) and value:
                text = text.replace(value, "…")
        return " ".join(PASSWORD_IN_ADDRESS.sub(r"\1…", text).split())[:MAX_PROBLEM]


def _environment(type_: str) -> dict[str, str]:
    names = {*SYSTEM, *PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR"}
    prefixes = ("LC_", *PASSED_ON[type_])
    return QUIET | {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}
