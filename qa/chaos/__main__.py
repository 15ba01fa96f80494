"""`python -m qa.chaos`: each fault of the matrix that this machine allows, on both databases, then an audit."""

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
"""What is shown of the processes' logs where a row fails."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in options.rows)]
    if options.list:
        sys.stdout.writelines(f"{row.name:32} {row.fault}: {row.also}\n" for row in rows)
        return 0
    if not rows:
        sys.stderr.write(f"No row is called {' or '.join(options.rows)}; --list tells their names.\n")
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
    """Whatever goes wrong with a row is an outcome, and the others go on."""
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
    except Exception as error:  # noqa: BLE001  (an assertion, or whatever else a broken service brings about)
        outcome.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        traceback.print_exc()
    outcome.seconds = time.monotonic() - began
    return outcome


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.chaos", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="NAME", help="Names of rows, or patterns: worker-*")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--list", action="store_true", help="Tell the rows, and try none.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
