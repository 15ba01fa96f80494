"""`python -m qa.chaos`: inject each fault that this machine allows, and audit what is left."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qa.chaos.audit.findings import INVARIANTS, Finding
from qa.chaos.environment import DATABASES, DatabaseKind, Fault, Ground
from qa.chaos.faults import FAULTS
from tests.services.programs import Missing

LOG_CHARS = 10_000
"""Number of characters of the processes' logs that are printed if a fault fails."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """The outcome of one fault on one database. `failure`: an error, after which nothing was audited. `left_out`: the
    reason why it could not run."""

    fault: Fault
    database: str
    seen: str = ""
    failure: str | None = None
    left_out: str | None = None
    findings: Sequence[Finding] = field(default_factory=list[Finding])
    seconds: float = 0.0

    @property
    def is_well(self) -> bool:
        return self.failure is None and not self.findings

    def line(self) -> str:
        verdict = "left out" if self.left_out else "ok" if self.is_well else "FAILED"
        told = self.left_out or self.failure or self.seen
        found = "".join(f"\n    {finding}" for finding in self.findings)
        return f"{verdict:8} {self.fault.name:30} {self.database:10} {self.seconds:6.1f} s  {told}{found}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    faults = [fault for fault in FAULTS if any(fnmatch.fnmatch(fault.name, pattern) for pattern in options.faults)]
    if options.list:
        print("\n".join(f"{fault.name:30} {fault.what}: {fault.promise}" for fault in faults))
        return 0
    if not faults:
        print(f"There is no fault {' or '.join(options.faults)}; --list prints all names.", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="lorry-faults-") as folder, Ground(Path(folder)) as ground:
        for fault in faults:
            for kind in fault.databases:
                if kind in options.databases:
                    outcomes.append(_try(ground, fault, kind))
                    print(outcomes[-1].line(), flush=True)
    print(f"\n{table(outcomes)}")
    return 0 if all(outcome.is_well for outcome in outcomes) else 1


def _try(ground: Ground, fault: Fault, kind: DatabaseKind) -> Outcome:
    """Run one fault. Any failure is an outcome, and the other faults still run."""
    began = time.monotonic()
    outcome = Outcome(fault=fault, database=kind)
    try:
        with ground.site(fault, kind) as site:
            began = time.monotonic()
            try:
                outcome.seen = fault.act(site)
                site.stop()
            except Exception:
                print(site.log()[-LOG_CHARS:], file=sys.stderr)
                raise
            outcome.findings = site.audit()
    except Missing as missing:
        outcome.left_out = str(missing)
    except Exception as error:  # noqa: BLE001  (an assertion, or any other error that a broken service causes)
        outcome.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        traceback.print_exc()
    outcome.seconds = time.monotonic() - began
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with a summary. A fault that was left out does not count as tried."""
    head = ("Fault", "Database", "What was done", "What was seen", *INVARIANTS, "Seconds")
    lines = [_row(head), _row("---" for _ in head)]
    for outcome in outcomes:
        seen = f"left out: {outcome.left_out}" if outcome.left_out else outcome.seen
        seen = f"**failed**: {outcome.failure}" if outcome.failure else seen
        violated = {finding.invariant for finding in outcome.findings}
        is_audited = not (outcome.left_out or outcome.failure)
        marks = [("no" if each in violated else "yes") if is_audited else "-" for each in INVARIANTS]
        cells = (outcome.fault.name, outcome.database, outcome.fault.what, seen, *marks, f"{outcome.seconds:.0f}")
        lines.append(_row(cells))
    num_left_out = sum(outcome.left_out is not None for outcome in outcomes)
    num_failed = sum(not outcome.is_well for outcome in outcomes)
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    tried = f"{len(outcomes) - num_left_out} tried, {num_left_out} left out, {num_failed} failed"
    return "\n".join([*lines, "", f"{tried}, {minutes:.0f} minutes."])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.chaos", description=__doc__)
    parser.add_argument(
        "--faults", nargs="+", default=["*"], metavar="NAME", help="Names of faults, or patterns: worker-*"
    )
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--list", action="store_true", help="List the faults without running them.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
