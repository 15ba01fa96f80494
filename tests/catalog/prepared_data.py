"""The data report and the details of a file, as preparation makes them."""

from __future__ import annotations

from typing import Any

REPORT: dict[str, Any] = {
    "format": 1,
    "kind": "chat",
    "max_length": 512,
    "rows": 100,
    "usable_rows": 100,
    "tokens": 5000,
    "supervised_tokens": 2000,
    "truncated_rows": 0,
    "dropped_rows": 0,
    "split_rows": 0,
    "empty_rows": 0,
    "duplicate_rows": 0,
    "longest_row": 80,
    "longest_example": 80,
    "median_row": 50,
}
SHOWN = {"start": 0, "tokens": [{"text": "secret", "id": 7, "is_trained": True}]}
ROW = {"part": None, "num_tokens": 1, "whole_tokens": 1, "trained_tokens": 1, "segments": [SHOWN]}
DETAILS: dict[str, Any] = {
    "samples": [{"line": 1, "flaws": [], "rows": [ROW]}],
    "lines": {"too_long": [], "empty": [], "duplicate": []},
}
