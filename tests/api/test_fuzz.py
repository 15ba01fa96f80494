"""A few hundred requests of the fuzzer, always the same ones. `make fuzz` sends tens of thousands."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from qa.fuzz.campaign import Campaign, run
from qa.fuzz.texts import is_any_text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fuzzing_finds_no_crashes_schema_violations_or_leaks(tmp_path: Path, migrated_database: Path) -> None:
    output, path = io.StringIO(), tmp_path / "lorry.db"
    shutil.copy(migrated_database, path)
    campaign = Campaign(examples=1, phases="fuzzing,stateful", is_short=True)

    outcome = run(campaign, tmp_path, database_url=f"sqlite:///{path}", echo=output)

    assert outcome.is_well, output.getvalue()
    assert outcome.counts.total() > 100


@pytest.mark.parametrize(
    ("finding", "query", "is_right"),
    [
        ("parameter `tag` in query - violates `anyOf` at /properties/tag", "tag=false&limit=95", True),
        ("parameters `tag`, `after` in query\n  - violates `anyOf` at /properties/tag", "limit=36&tag=-4.9e16", True),
        ("parameters `tag`, `after` in query", "after=%00&tag=3", False),
        ("parameter `limit` in query - violates `maximum`", "limit=1000", False),
        ("parameter `tag` in path", "tag=3", False),
    ],
)
def test_any_text_is_a_valid_tag_in_a_query(finding: str, query: str, is_right: bool) -> None:
    message = f"Invalid data should have been rejected\nInvalid component: {finding}"

    assert is_any_text(message, f"http://127.0.0.1/v1/fine_tuning/jobs?{query}") is is_right
