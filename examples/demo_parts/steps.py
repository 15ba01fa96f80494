"""The demo's steps in order, and the message of each failure."""

from __future__ import annotations

import os
import signal
import time
from typing import cast

from openai import APIError, OpenAIError
from python_docstrings import build, write

from demo_parts import base_source, report, service, sizing, surroundings, training
from demo_parts.report import console
from lorry import LorryError

BASE = "smollm2-135m"


def main() -> int:
    started = time.monotonic()
    removed = surroundings.remove_lorry_settings()
    root = surroundings.folder()
    with surroundings.locked(root):
        report.heading(1, "A real base model")
        source = base_source.find(root)
        console.print(f"{source.where}")

        report.heading(2, "A real data set: docstrings of this machine's Python")
        train, held_out = build(root / "train.jsonl", root / "held_out.jsonl")
        report.data_set(train, held_out)

        report.heading(3, "The service")
        command, keep = service.command(root / "data", removed), bool(os.environ.get("KEEP"))
        with service.running(root / "data", root / "lorry-up.log", command, keep=keep) as running:
            lorry = running.lorry
            base = service.add_base(lorry, BASE, source)

            report.heading(4, "How fast is this machine?")
            uploaded = training.upload(lorry, root / "train.jsonl")
            row_seconds = training.measure(lorry, BASE, uploaded)
            left = sizing.TARGET_SECONDS - sizing.RESERVED_SECONDS - (time.monotonic() - started)
            size = sizing.choose(row_seconds, left)
            held_out = held_out[: size.held_out_rows]
            write(root / "held_out.jsonl", held_out)
            report.chosen(size, size.seconds(row_seconds))

            report.heading(5, "Three jobs on that one base model, with the openai client")
            jobs = training.train(lorry, BASE, uploaded, root / "held_out.jsonl", size)

            report.heading(6, "Results")
            outcomes = training.outcomes(lorry, jobs)
            report.table(outcomes, base)
            best = min(outcomes, key=lambda outcome: outcome.loss)
            asked = held_out[: training.NUM_ASKED]
            checked = training.check(lorry, base, best, [f.question() for f in asked], root)
            report.answers(checked["answers"], asked, best)

            report.heading(7, "The best adapter, downloaded and loaded by PEFT in a process without Lorry")
            report.agreement(checked, best)
            report.lineage(best.lineage)

            report.heading(8, f"Done in {time.monotonic() - started:.0f} s")
            problems = training.problems(outcomes, checked)
            for problem in problems:
                console.print(f"[bold red]{problem}")
            service.farewell(running, command, best.name, asked[0].question())
    return 1 if problems else 0


def run() -> int:
    """Run `main`. Print each failure as a sentence, and return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        return main()
    except KeyboardInterrupt:
        console.print("Interrupted. The demo has stopped the service that it started.")
        return 130
    except LorryError as failure:
        report.failed(failure.sentence())
    except OpenAIError as failure:
        body = failure.body if isinstance(failure, APIError) else None
        message = cast("dict[str, object]", body).get("message") if isinstance(body, dict) else None
        report.failed(str(message or failure))
    except report.DemoFailed as failure:
        report.failed(str(failure))
    except OSError as failure:
        report.failed(surroundings.explained(failure))
    return 1


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
