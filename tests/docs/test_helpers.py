"""The helpers find blocks, compare output and reject wrong commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.expected_output import matches
from tests.docs.pages import Block, blocks
from tests.docs.static_checks import problems

PAGE = """# Page

```sh
lorry up
```

```text
Lorry is running
```

<!-- not run: needs a GPU -->
```sh
lorry status
```

1. In a list:

    ```python
    print(1)
    ```

    <!-- example output -->
    ```text
    1
    ```
"""


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("ftjob-27c1f0a9d83b4e6c95a0b1d2", "ftjob-a83a893f27ea5f65a3748e75"),
        ("loss 1.5  270 MB", "loss 0.00246  3 kB"),
        ("first\n…\nlast", "first\nsecond\nthird\nlast"),
        ("NAME  STATE", "NAME          STATE"),
        ("data …/.lorry", "data /tmp/home/.lorry"),
        ("key …gz0I active", "key …Lr9Y active"),
    ],
)
def test_output_of_the_same_kind_matches(expected: str, actual: str) -> None:
    assert matches(expected, actual)


@pytest.mark.parametrize(("expected", "actual"), [("ready", "failed"), ("a\nb", "a\nb\nc"), ("1 job", "no job")])
def test_different_output_does_not_match(expected: str, actual: str) -> None:
    assert not matches(expected, actual)


def test_blocks_have_their_output_and_the_reason_why_they_are_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)

    assert blocks(page) == [
        Block(language="sh", text="lorry up\n", line=4, output="Lorry is running\n"),
        Block(language="sh", text="lorry status\n", line=13, not_run="needs a GPU"),
        Block(language="python", text="print(1)\n", line=19),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "lorry jobs submit m t.jsonl --epochs 3 && lorry status  # lorry nothing",
        "JOB=$(lorry jobs list -q -n 1)",
        "lorry jobs show $(lorry jobs list -q | head -n 1)",
        "cat > x <<'EOF'\nlorry nothing\nEOF\nmake demo KEEP=1",
        "lorry files upload not-there.jsonl | tail",
    ],
)
def test_valid_commands_have_no_problems(text: str) -> None:
    assert list(problems(Block(language="sh", text=text, line=1))) == []


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "lorry nothing"),
        ("sh", "A=$(lorry jobs submit m t --no-such-option)"),
        ("sh", "lorry jobs submit m t --epochs many"),
        ("sh", "lorry jobs show $(lorry jobs nothing)"),
        ("sh", "make nothing"),
        ("sh", "if true"),
        ("python", "def"),
    ],
)
def test_invalid_commands_have_a_problem(language: str, text: str) -> None:
    assert len(list(problems(Block(language=language, text=text, line=1)))) == 1
