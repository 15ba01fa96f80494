"""Counts the lines of Python by package: `make size`, or `python -m tools.size REVISION` to compare with a revision."""

import argparse
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICE = ("api", "catalog", "worker", "lora_core", "lorry")
DEVELOPMENT = ("qa", "benchmarks", "tools")
GENERATED = ("lorry/models.py", "lorry/requests.py")
"""Files that tools/sdk_types.py writes. They are counted apart."""


def lines(revision: str | None = None) -> Counter[str]:
    """Return the lines of the tracked Python files by top-level folder. revision: None for the working tree."""
    command = ["git", "grep", "--count", "", *([revision] if revision else []), "--", "*.py"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    counts: Counter[str] = Counter()
    for line in found.splitlines():
        path, _, number = line.removeprefix(f"{revision}:").rpartition(":")
        counts["generated" if path in GENERATED else path.partition("/")[0]] += int(number)
    return counts


def table(*columns: Counter[str]) -> str:
    """Return a table with a column for each state of the project."""
    rows = [(name, [column[name] for column in columns]) for name in (*SERVICE, *DEVELOPMENT, "tests", "generated")]
    for title, group in ((f"the {len(SERVICE)} packages", SERVICE), (", ".join(DEVELOPMENT), DEVELOPMENT)):
        rows.append((title, [sum(column[name] for name in group) for column in columns]))
    return "\n".join(f"{name:24}" + "".join(f"{number:10,}" for number in numbers) for name, numbers in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("revision", nargs="?", help="a commit or tag, shown in the first column")
    revision: str | None = parser.parse_args().revision
    print(table(*([lines(revision)] if revision else []), lines()))


if __name__ == "__main__":
    main()
