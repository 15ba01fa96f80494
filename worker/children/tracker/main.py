"""A process that writes one run to a tracker. It reads requests as lines of JSON, and answers each with one line.

It has access to the tracker's library, but not to the database or the trainer. It exits when its standard input closes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from catalog.process_inspection import deny_inspection
from worker.children.tracker.runs import Json, MlflowRun, TensorBoardRun, TrackerRun, WandbRun

OPENERS: dict[str, Any] = {"mlflow": MlflowRun, "tensorboard": TensorBoardRun, "wandb": WandbRun}


def main() -> int:
    deny_inspection()  # its environment holds the tracker's credentials
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to standard output, which carries the answers
    try:
        _serve(sys.stdin, answers)
    except Exception as error:  # noqa: BLE001  (any error of a library is reported, and ends the process)
        _send(answers, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _serve(lines: TextIO, answers: TextIO) -> None:
    opening: Json = json.loads(next(lines))
    run: TrackerRun = OPENERS[opening["type"]](opening)
    _send(answers, {"run_id": run.run_id})
    for line in lines:
        request: Json = json.loads(line)
        run.write(request["points"])
        if request["end"] is not None:
            run.end(request["end"])
        _send(answers, {})
        if request["end"] is not None:
            return
    run.close()


def _send(answers: TextIO, answer: Json) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
