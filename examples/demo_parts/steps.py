"""The demo's seven steps in order, and the messages for failures."""

from __future__ import annotations

import os
import signal
import time
from typing import cast

from openai import APIError, OpenAIError
from python_docstrings import build

from demo_parts import base_source, report, service, surroundings, training
from demo_parts.report import console
from lorry import LorryError

BASE = "smollm2-135m"


def main() -> int:
    started = time.monotonic()
    surroundings.leave_settings_aside()
    root = surroundings.folder()
    with surroundings.alone_in(root):
        report.heading(1, "A real base model")
        source = base_source.find(root)
        console.print(f"{source.where}")

        report.heading(2, "A real dataset, from this machine's own Python")
        train, held_out = build(root / "train.jsonl", root / "held_out.jsonl")
        report.data_set(train, held_out)
        asked = held_out[: training.NUM_ASKED]

        report.heading(3, "The service")
        with service.running(root / "data", root / "lorry-up.log", keep=bool(os.environ.get("KEEP"))) as running:
            lorry = running.lorry
            base = service.add_base(lorry, BASE, source)

            report.heading(4, "Three jobs on one base model, created with the openai client")
            jobs = training.train(lorry, BASE, root / "train.jsonl", root / "held_out.jsonl")

            report.heading(5, "Training results")
            outcomes = training.outcomes(lorry, jobs)
            report.table(outcomes, base)
            best = min(outcomes, key=lambda outcome: outcome.loss)
            checked = training.check(lorry, base, best, [f.question() for f in asked], root)
            report.answers(checked["answers"], asked, best)

            report.heading(6, "The best adapter, downloaded and loaded by PEFT in a process without Lorry")
            report.agreement(checked, best)
            report.lineage(best.lineage)

            report.heading(7, f"Done in {time.monotonic() - started:.0f} s")
            problems = training.problems(outcomes, checked)
            for problem in problems:
                console.print(f"[bold red]{problem}")
            service.farewell(running, root / "data")
    return 1 if problems else 0


def run() -> int:
    """Run `main` and print failures as sentences."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        return main()
    except KeyboardInterrupt:
        console.print("Interrupted. Everything that the demo had started is stopped.")
        return 130
    except LorryError as failure:
        report.failed(failure.sentence())
    except OpenAIError as failure:
        body = failure.body if isinstance(failure, APIError) else None
        told = cast("dict[str, object]", body).get("message") if isinstance(body, dict) else None
        report.failed(str(told or failure))
    except report.DemoFailed as failure:
        report.failed(str(failure))
    except OSError as failure:
        report.failed(surroundings.told(failure))
    return 1


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
