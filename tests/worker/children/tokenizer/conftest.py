"""Base models whose chat templates the tokenizer handles in different ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.chat_bases import MARKED, SMOLLM2, Base


@pytest.fixture(params=["by prefixes", "by marks"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_json: str) -> Base:
    return Base(tmp_path / "base", tokenizer_json, SMOLLM2 if request.param == "by prefixes" else MARKED)
