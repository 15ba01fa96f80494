"""`python -m qa.fuzz`: run schemathesis over the whole API, with the keys of two projects, on SQLite and PostgreSQL."""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from qa.fuzz.campaign import Campaign, run
from tests.services.postgres import postgres_server


def main() -> int:
    arguments = _parser().parse_args()
    given = {name: getattr(arguments, name) for name in ("seed", "examples", "rounds", "phases", "only")}
    campaign = Campaign(**given)
    is_well = True
    for name in arguments.database:
        with tempfile.TemporaryDirectory() as folder, _database(name, Path(folder)) as url:
            done = run(campaign, Path(folder), database_url=url, echo=sys.stdout)
            print(f"\n{name}\n{done.table()}")
            is_well = is_well and done.is_well
    return 0 if is_well else 1


def _database(name: str, folder: Path) -> AbstractContextManager[str]:
    return nullcontext(f"sqlite:///{folder / 'lorry.db'}") if name == "sqlite" else postgres_server()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qa.fuzz", description=__doc__)
    parser.add_argument("--database", nargs="+", choices=("sqlite", "postgresql"), default=("sqlite", "postgresql"))
    parser.add_argument("--examples", type=int, default=5, help="Maximum number of cases per operation and phase.")
    parser.add_argument("--rounds", type=int, default=1, help="Rounds of the stateful phase over each part of the API.")
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful")
    parser.add_argument("--only", default="", help="A regular expression for the paths to test.")
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
