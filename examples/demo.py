"""The main job, end to end: a real base, real data, three adapters trained together, and the proof that they work.

    make demo            or            python examples/demo.py

KEEP=1 leaves the service running. LORRY_DEMO_DIR names another folder than .cache/demo. It can be run again
at once: the base model and the service's data are kept there, and every run makes new jobs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import cast

from demo_parts import base_source, report, service, training
from demo_parts.report import console
from openai import APIError, OpenAIError
from python_docstrings import build

from lorry import LorryError

BASE = "smollm2-135m"


def main() -> int:
    started = time.monotonic()
    root = Path(os.environ.get("LORRY_DEMO_DIR") or Path(__file__).parent.parent / ".cache" / "demo").resolve()
    root.mkdir(parents=True, exist_ok=True)

    report.heading(1, "A real base model")
    source = base_source.find(root)
    console.print(f"{source.where}")

    report.heading(2, "A real data set, from this machine's own Python")
    train, held_out = build(root / "train.jsonl", root / "held_out.jsonl")
    report.data_set(train, held_out)

    report.heading(3, "The service")
    with service.running(root / "data", root / "lorry-up.log", keep=bool(os.environ.get("KEEP"))) as lorry:
        base = service.add_base(lorry, BASE, source)

        report.heading(4, "Three jobs on that one base, by the openai client")
        jobs = training.train(lorry, BASE, root / "train.jsonl", root / "held_out.jsonl")

        report.heading(5, "What came of it")
        outcomes = training.outcomes(lorry, jobs)
        report.table(outcomes, base)
        best = min(outcomes, key=lambda outcome: outcome.loss)
        checked = training.check(lorry, base, best, [f.question() for f in report.examples(held_out)], root)
        report.answers(checked["answers"], held_out, best)

        report.heading(6, "The best adapter, downloaded and loaded by PEFT alone in a process without Lorry")
        report.agreement(checked, best)
        report.lineage(lorry.adapters.lineage(best.name))

        report.heading(7, f"Done in {time.monotonic() - started:.0f} s")
        problems = training.problems(outcomes, checked)
        for problem in problems:
            console.print(f"[bold red]{problem}")
        service.farewell(lorry, root / "data")
    return 1 if problems else 0


def run() -> int:
    """`main`, whose failures are told as a sentence."""
    try:
        return main()
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 130
    except LorryError as failure:
        report.failed(failure.sentence())
    except OpenAIError as failure:
        body = failure.body if isinstance(failure, APIError) else None
        told = cast("dict[str, object]", body).get("message") if isinstance(body, dict) else None
        report.failed(str(told or failure))
    except report.DemoFailed as failure:
        report.failed(str(failure))
    return 1


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupted)
    sys.exit(run())
