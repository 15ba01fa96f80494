"""The JSON lines that a logger writes."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from catalog import logs


@contextmanager
def json_log(logger_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Yield the output of a logger, with one JSON object per line."""
    monkeypatch.setenv("LORRY_LOG_FORMAT", "json")
    out, logger = io.StringIO(), logging.getLogger(logger_name)
    handler, level = logging.StreamHandler(out), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logs.set_up_handlers(logger)
    try:
        yield out
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def lines_of(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]
