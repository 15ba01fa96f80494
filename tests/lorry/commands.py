"""The command line as a child process, next to a running service."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Commands:
    """Runs commands in `folder` with the service of `data_dir`. Each command has a timeout of `seconds`."""

    folder: Path
    data_dir: Path
    seconds: float

    def run(self, *arguments: object, code: int = 0) -> str:
        """Run a command and check its exit code. Returns its stdout, or its stderr for a code other than 0."""
        argv = [sys.executable, "-P", "-m", "lorry", *map(str, arguments)]
        env = {**os.environ, "LORRY_DATA_DIR": str(self.data_dir)}
        done = subprocess.run(
            argv, env=env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=self.seconds
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr
