"""The command line in a process of its own, as a person runs it beside a service."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Commands:
    """Run in `folder`, with the service of `data_dir`; each is given so many seconds."""

    folder: Path
    data_dir: Path
    seconds: float

    def run(self, *arguments: object, code: int = 0) -> str:
        """What it printed: on stderr, where it is to fail with this code."""
        argv = [sys.executable, "-P", "-m", "lorry", *map(str, arguments)]
        env = {**os.environ, "LORRY_DATA_DIR": str(self.data_dir)}
        done = subprocess.run(
            argv, env=env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=self.seconds
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr
