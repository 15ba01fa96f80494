"""`python -m qa.chaos`: inject each fault that this machine allows, on both databases, and audit the result."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from qa.chaos.environment import Ground
from qa.chaos.matrix import NOT_HERE, ROWS
from qa.chaos.report import Outcome, table
from qa.chaos.scenario import DATABASES, DatabaseKind, Row
from tests.services.programs import Missing

LOG_CHARS = 10_000
"""Number of characters of the processes' logs that are printed if a row fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in options.rows)]
    if options.list:
        sys.stdout.writelines(f"{row.name:32} {row.fault}: {row.also}\n" for row in rows)
        return 0
    if not rows:
        sys.stderr.write(f"There is no row {' or '.join(options.rows)}; --list prints all names.\n")
        return 2
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="lorry-faults-") as folder, Ground(Path(folder)) as ground:
        for row in rows:
            for kind in row.databases:
                if kind in options.databases:
                    outcomes.append(_try(ground, row, kind))
                    sys.stdout.write(f"{outcomes[-1].line()}\n")
                    sys.stdout.flush()
    sys.stdout.write(f"\n{table(outcomes, NOT_HERE if options.rows == ['*'] else ())}\n")
    return 0 if all(outcome.is_well for outcome in outcomes) else 1


def _try(ground: Ground, row: Row, kind: DatabaseKind) -> Outcome:
    """Run one row. Any failure is an outcome, and the other rows still run."""
    began = time.monotonic()
    outcome = Outcome(row=row, database=kind)
    try:
        with ground.site(row, kind) as site:
            began = time.monotonic()
            try:
                outcome.seen = row.act(site)
                site.stop()
            except Exception:
                sys.stderr.write(f"{site.log()[-LOG_CHARS:]}\n")
                raise
            outcome.findings = site.audit()
    except Missing as missing:
        outcome.left_out = str(missing)
    except Exception as error:  # noqa: BLE001  (an assertion, or any other error that a broken service causes)
        outcome.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        traceback.print_exc()
    outcome.seconds = time.monotonic() - began
    return outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.chaos", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="NAME", help="Names of rows, or patterns: worker-*")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--list", action="store_true", help="List the rows without running them.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
