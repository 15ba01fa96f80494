"""The log of a run of the GPU kit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "kit.jsonl").read_text().splitlines()]
