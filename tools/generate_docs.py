"""Writes the files in this tree that are generated from the code: `make docs`. `--check` compares.

The generated pages of the documentation site are written when it is built, by tools/site.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tools import error_reference, job_options, sdk_types

ROOT = Path(__file__).parents[1]
FILES: dict[str, Callable[[], str]] = {
    "dashboard/errors.html": error_reference.dashboard_page,
    "lorry/cli/parsing/job_options.json": job_options.job_options,
    "lorry/models.py": sdk_types.models,
    "lorry/requests.py": sdk_types.requests,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file differs from the code")
    is_check = parser.parse_args().check
    outdated: list[str] = []
    for name, write in FILES.items():
        path, text = ROOT / name, write()
        if path.read_text(encoding="utf-8") == text:
            continue
        outdated.append(name)
        if not is_check:
            path.write_text(text, encoding="utf-8")
    for name in outdated:
        print(f"{name} does not match the code. Run: make docs" if is_check else f"wrote {name}")
    return 1 if is_check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
