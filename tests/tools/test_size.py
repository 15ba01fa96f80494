"""`make size` counts the lines of the tracked Python files."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tools import size


def test_lines_are_counted_by_package_in_the_working_tree_and_in_a_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(("git", *identity, *arguments), cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(size, "ROOT", tmp_path)
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "a.py").write_text("one = 1\n\ntwo = 2\n")
    (tmp_path / "lorry").mkdir()
    (tmp_path / "lorry" / "models.py").write_text("one = 1\n")
    (tmp_path / "api" / "notes.md").write_text("not Python\n")
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    (tmp_path / "api" / "a.py").write_text("one = 1\n")

    assert (size.lines("HEAD"), size.lines()) == (Counter(api=3, generated=1), Counter(api=1, generated=1))


def test_table_has_a_sum_of_the_packages() -> None:
    shown = size.table(Counter(api=1200, tests=5), Counter(api=1000, lorry=1, tests=7)).splitlines()

    assert shown[0].split() == ["api", "1,200", "1,000"]
    assert "the 5 packages               1,200     1,001" in shown
