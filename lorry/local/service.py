"""The commands of the service. In this package, only this module knows `api` and `worker`.

The commands are run as processes, never imported.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, cast

from lorry.errors import LorryError
from lorry.local.child import Child

_NEEDED = ("lorry-server", "torch", "transformers", "peft")
"""Names of distributions, because a package named `api` or `worker` may be the user's own."""
_COMMAND_SECONDS = 300
_INSTALL = (
    f'Run `{sys.executable} -m pip install "lorry-server[worker]=={version("lorry")}"`. In Lorry\'s source folder, '
    'install `./client ".[worker]"` instead.'
)


def check_installed() -> None:
    """Raises LorryError if this environment has only the client, or the server without the libraries of a worker."""
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        raise LorryError("server_not_installed", missing=", ".join(missing), install=_INSTALL)


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrapped:
    """Credentials for the client, returned by each start of the database."""

    api_key: str | None = field(repr=False)
    """The first operator key. None: an earlier start created and showed it."""
    identity_secret: str = field(repr=False)
    """Secret with which clients verify the server: see lorry.transport.service_identity."""
    warnings: tuple[str, ...] = ()
    """About variables LORRY_… that have no effect."""


class LocalService:
    """The service on one data folder. Its API server accepts connections on `listener`, which was opened at `host`."""

    def __init__(self, data_dir: Path, *, host: str, listener: socket.socket) -> None:
        self.data_dir = data_dir
        self.logs = data_dir / "logs"
        self._host = host
        self._listener = listener
        self._env = _environment(data_dir)

    def bootstrap(self) -> Bootstrapped:
        """Create or migrate the database."""
        answer = self._run("bootstrap", "--json", "--identity-secret")
        key = answer.get("api_key")
        return Bootstrapped(
            api_key=key if isinstance(key, str) else None,
            identity_secret=_field(answer, "identity_secret", command="bootstrap"),
            warnings=tuple(map(str, answer.get("warnings") or ())),
        )

    def new_key(self) -> str:
        """Create another operator key, for users who have the data folder but no key."""
        return _field(self._run("new-key", "--json", "--name", "lorry up"), "api_key", command="new-key")

    def sign_in_link(self) -> str:
        """Create a one-time sign-in link."""
        return _field(self._run("sign-in-link", "--json"), "url", command="sign-in-link")

    def api(self) -> Child:
        inherited = self._listener.fileno()
        argv = _python("api", "serve", "--host", self._host, "--listen-fd", str(inherited))
        return self._child("api", argv, pass_fds=(inherited,))

    def workers(self, chosen: Sequence[str]) -> list[Child]:
        """Return one worker per device."""
        names = ["worker"] if len(chosen) == 1 else [f"worker-{device}" for device in chosen]
        return [
            self._child(name, _python("worker.entrypoints.loop", "--device", device))
            for name, device in zip(names, chosen, strict=True)
        ]

    def _child(self, name: str, argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> Child:
        log = self.logs / f"{name}.log"
        return Child(name, argv, env=self._env, cwd=self.data_dir, log=log, pass_fds=pass_fds)

    def _run(self, *arguments: str) -> dict[str, Any]:
        """Return the JSON object that a command of the API server prints. Raises LorryError with its last output."""
        done = subprocess.run(
            _python("api", *arguments),
            env=self._env,
            cwd=self.data_dir,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
            start_new_session=True,  # only this process handles Ctrl-C
        )
        try:
            parsed: object = json.loads(done.stdout)
        except ValueError:
            parsed = None
        if done.returncode or not isinstance(parsed, dict):
            last = "\n".join(f"    {line}" for line in (done.stderr or done.stdout).splitlines()[-15:])
            result = "printed no JSON object"
            if done.returncode < 0:
                result = f"was killed by {signal.Signals(-done.returncode).name}"
            elif done.returncode > 0:
                result = f"failed (exit status {done.returncode})"
            if last:
                raise LorryError("service_command_failed", arguments=arguments[0], result=result, last=last)
            raise LorryError("service_command_failed_silently", arguments=arguments[0], result=result)
        return cast("dict[str, Any]", parsed)


def become_workers(data_dir: Path, groups: Sequence[str]) -> None:
    """Replace this process by the supervisor of a node's workers. Does not return."""
    command = _python("worker.entrypoints.node_supervisor", *groups)
    sys.stdout.flush()
    os.execve(command[0], command, _environment(data_dir))  # noqa: S606 - no shell is needed


def _environment(data_dir: Path) -> dict[str, str]:
    """Return the environment of child processes, without the client's address and key."""
    environment = {name: value for name, value in os.environ.items() if name not in {"LORRY_URL", "LORRY_API_KEY"}}
    environment |= {"LORRY_DATA_DIR": str(data_dir), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep, or two processes starve each other
    return environment


def _field(answer: Mapping[str, Any], name: str, *, command: str) -> str:
    """Return a field of a command's output. Raises LorryError if it is missing."""
    value = answer.get(name)
    if not isinstance(value, str):
        raise LorryError("service_output_incomplete", command=command, name=name, install=_INSTALL)
    return value


def _python(module: str, *arguments: str) -> list[str]:
    """Return a Python command. -P: a folder named `api` in the current directory must not shadow the package."""
    return [sys.executable, "-P", "-m", module, *arguments]
