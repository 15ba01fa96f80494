"""Checks a data set in a separate process, so that it does not block the threads of the API server.

`python -m catalog.datasets.check_process PATH MAX_LINE_BYTES MAX_ROWS` writes one JSON object: the properties of the
file, or the reason why it is rejected. It exits when its standard input closes, and thus with its parent process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from catalog.datasets import validator
from catalog.datasets.validator import DatasetCheck
from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest, Unavailable
from catalog.processes import how_it_exited, is_killed

POLL_SECONDS = 0.1
"""Interval at which the parent checks whether the result is still needed."""
NICENESS = 10
"""Added to the API server's own niceness, so that requests take precedence."""
LOST_PARENT = 113
"""Exit status of a check whose parent has exited."""
ALLOWED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables that the check inherits. They contain no passwords or keys."""
ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "catalog.datasets.check_process")
log = logging.getLogger("lorry.catalog")


class CheckCrashed(Unavailable):
    """The process that checks the file exited without a result, for example because it ran out of memory."""


class CheckStopped(Unavailable):
    """The result is no longer needed: the client has disconnected, or the API server is shutting down."""


def inspect(
    path: Path, *, max_line_bytes: int, max_rows: int, is_abandoned: Callable[[], bool] = lambda: False
) -> DatasetCheck:
    """Run `validator.inspect` on a file in a separate process.

    is_abandoned: called several times a second; the check is killed once it returns True.

    Raises InvalidRequest for a rejected file, CheckStopped and CheckCrashed.
    """
    command = [*COMMAND, str(path), str(max_line_bytes), str(max_rows)]
    environment = {name: os.environ[name] for name in ALLOWED if name in os.environ}
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=errors, env=environment, cwd=ROOT
        ) as process,
    ):
        try:
            _wait(process, is_abandoned)
        finally:
            process.kill()  # does nothing if the process has exited
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise _crashed(process.returncode, errors.read())
        result = json.loads(output.read())
    if "refusal" in result:
        raise InvalidRequest(ErrorText(**result["refusal"]))
    return DatasetCheck(**result)


def _wait(process: subprocess.Popen[bytes], is_abandoned: Callable[[], bool]) -> None:
    while True:
        if is_abandoned():
            raise CheckStopped("check_stopped")
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def _crashed(status: int, errors: bytes) -> CheckCrashed:
    lines = errors.decode("utf-8", "replace").splitlines() or ["no output"]
    log.error("the check of a data set failed: status=%d %s", status, lines[-1][:300])
    exited = how_it_exited(status)
    return CheckCrashed("dataset_check_out_of_memory" if is_killed(status) else "dataset_check_failed", exited=exited)


def main(path: str, max_line_bytes: str, max_rows: str) -> None:
    """Run the check, and write its result to stdout."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        with Path(path).open("rb") as lines:
            check = validator.inspect(lines, max_line_bytes=int(max_line_bytes), max_rows=int(max_rows))
        result = asdict(check)
    except InvalidRequest as error:
        result = {"refusal": asdict(error.text)}
    sys.stdout.write(json.dumps(result))


def _exit_with_parent() -> None:
    os.read(0, 1)  # sys.stdin would hold its lock at exit
    os._exit(LOST_PARENT)


if __name__ == "__main__":
    main(*sys.argv[1:])
