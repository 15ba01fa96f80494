"""The check of a data set in a process of its own, so that it does not hold up the threads of the API server.

`python -m catalog.datasets.check_process PATH MAX_LINE_BYTES MAX_ROWS` writes one JSON object: what the file is, or
why it is rejected. It exits when its standard input ends, and so with the process that started it.
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
from catalog.errors import InvalidRequest, Unavailable

POLL_SECONDS = 0.1
"""Between two questions whether the result is still wanted."""
NICENESS = 10
"""Above the API server's own: requests come first."""
LOST_PARENT = 113
"""Exit status of a check whose parent has gone."""
ALLOWED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""The environment of the check: no password or key is among it."""
ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "catalog.datasets.check_process")
log = logging.getLogger("lorry.catalog")


class CheckCrashed(Unavailable):
    """The process that checks the file ended without a result, for lack of memory perhaps."""


class CheckStopped(Unavailable):
    """Nobody waits for the result any more: the client has gone, or the API server stops."""


def inspect(
    path: Path, *, max_line_bytes: int, max_rows: int, is_abandoned: Callable[[], bool] = lambda: False
) -> DatasetCheck:
    """As datasets.inspect, for a file. `is_abandoned` is asked several times a second; then the check is killed.

    Raises InvalidRequest for a file that is rejected, CheckStopped, and CheckCrashed.
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
            process.kill()  # nothing, once it has ended
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise _crashed(process.returncode, errors.read())
        result = json.loads(output.read())
    if "refusal" in result:
        raise InvalidRequest(**result["refusal"])
    return DatasetCheck(**result)


def _wait(process: subprocess.Popen[bytes], is_abandoned: Callable[[], bool]) -> None:
    while True:
        if is_abandoned():
            raise CheckStopped(
                "The check of the file was stopped: the client disconnected, or the API server is shutting down.",
                code="check_stopped",
                remedy="Send the request again.",
            )
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def _crashed(status: int, errors: bytes) -> CheckCrashed:
    lines = errors.decode("utf-8", "replace").splitlines() or ["no output"]
    log.error("the check of a data set failed: status=%d %s", status, lines[-1][:300])
    return CheckCrashed(
        f"The process that checks the file ended with exit status {status}.",
        code="dataset_check_failed",
        remedy="Try again. If it fails again, ask the operator whether the API server's machine has enough memory.",
    )


def main(path: str, max_line_bytes: str, max_rows: str) -> None:
    """The check itself."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        with Path(path).open("rb") as lines:
            check = validator.inspect(lines, max_line_bytes=int(max_line_bytes), max_rows=int(max_rows))
        result = asdict(check)
    except InvalidRequest as error:
        refusal = {"message": error.message, "code": error.code, "remedy": error.remedy, "param": error.param}
        result = {"refusal": refusal}
    sys.stdout.write(json.dumps(result))


def _exit_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock would be held at exit
    os._exit(LOST_PARENT)


if __name__ == "__main__":
    main(*sys.argv[1:])
