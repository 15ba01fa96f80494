"""Results of the kit: one line of JSON each, which reaches the disk at once, and a page of tables."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

Value = float | int | bool | str | None


class Log:
    """Appends to `folder`/kit.jsonl, and writes `folder`/kit.md from all lines of that file."""

    def __init__(self, folder: Path, *, started: float) -> None:
        """`started` is the start of the run, in seconds of the monotonic clock."""
        folder.mkdir(parents=True, exist_ok=True)
        self.page, self.started = folder / "kit.md", started
        self.lines = folder / "kit.jsonl"
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in _whole_lines(self.lines)]

    def record(self, stage: str, name: str, value: Value, unit: str, **details: Any) -> None:
        """Write one result. NaN and infinity are written as text, because JSON has no number for them."""
        second = round(time.monotonic() - self.started, 2)
        line = {"second": second, "stage": stage, "name": name, "value": _plain(value), "unit": unit}
        line |= {key: _plain(detail) for key, detail in details.items()}
        self._lines.append(line)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_page(self) -> None:
        """Write all results so far as tables, one for each stage, by way of a temporary file."""
        text = ["# GPU kit", ""]
        for stage in dict.fromkeys(line["stage"] for line in self._lines):
            text += [f"## {stage}", "", "| Second | Result | Value | Unit | Details |", "|--:|---|--:|---|---|"]
            text += [_row(line) for line in self._lines if line["stage"] == stage] + [""]
        draft = self.page.with_suffix(".new")
        draft.write_text("\n".join(text), "utf-8")
        draft.replace(self.page)


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of an earlier run. Removes a last line that was cut off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return whole.decode("utf-8").splitlines()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def _row(line: dict[str, Any]) -> str:
    details = {key: value for key, value in line.items() if key not in ("second", "stage", "name", "value", "unit")}
    told = "; ".join(f"{key}: {value}" for key, value in details.items() if key != "traceback")
    if "traceback" in details:
        told = "; ".join(filter(None, [told, str(details["traceback"]).strip().rpartition("\n")[2]]))
    cells = (line["second"], line["name"], line["value"], line["unit"], told)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
