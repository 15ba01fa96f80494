"""The demo's data set: real text, deterministic, and split by module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import python_docstrings  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    python_docstrings.build(folder / "train.jsonl", folder / "valid.jsonl")
    return folder / "train.jsonl", folder / "valid.jsonl"


def rows(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]


def test_data_set_has_the_stated_size_and_chat_format(files: tuple[Path, Path]) -> None:
    train, valid = map(rows, files)

    assert len(train) == python_docstrings.TRAIN_ROWS
    assert len(valid) == python_docstrings.HELD_OUT_ROWS
    for user, assistant in train + valid:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith("In one sentence: what does `")
        assert assistant["content"].endswith(".")


def test_training_and_validation_share_no_module_or_answer(files: tuple[Path, Path]) -> None:
    modules = [{row[0]["content"].split("`")[1].partition(".")[0] for row in rows(path)} for path in files]
    answers = [{row[1]["content"] for row in rows(path)} for path in files]

    assert not modules[0] & modules[1]
    assert not answers[0] & answers[1]


def test_data_set_contains_nothing_of_this_machine(files: tuple[Path, Path]) -> None:
    text = "".join(path.read_text("utf-8") for path in files)

    assert sys.prefix not in text
    assert " at 0x" not in text


def test_another_run_produces_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    argv = [sys.executable, str(EXAMPLES / "python_docstrings.py"), str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run(argv, check=True, env={"PYTHONHASHSEED": "7"}, capture_output=True)

    assert [(tmp_path / name).read_bytes() for name in ("a", "b")] == [path.read_bytes() for path in files]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Copy data from src to dst.\n\nMore.", "Copy data from src to dst."),
        ("Return a\n    ``str`` object.  And more.", "Return a str object."),
        ("Like :func:`open`, e.g. for x. Then y.", "Like open, e.g. for x."),
        ("", ""),
    ],
)
def test_first_sentence_is_extracted_without_markup(docstring: str, sentence: str) -> None:
    assert python_docstrings.first_sentence(docstring) == sentence


def test_modules_that_open_windows_are_skipped() -> None:
    assert {"antigravity", "this", "turtle", "tkinter", "idlelib"} <= python_docstrings.SKIPPED
