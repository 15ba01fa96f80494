"""The tools that check prose: words and sentence lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_words import WORDS, Config, findings, prose
from tools.sentence_lengths import long_cells, main, sentence_lengths

CONFIG = """
[avoid]
'told' = "report"

[avoid_exact]
'Of [a-z]' = "a noun phrase"

[[skip]]
paths = "vendor/*"
reason = "Text of others."

[[allow]]
paths = "a.py"
text = "was told twice"
reason = "A title."
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "words.toml").write_text(CONFIG)
    return Config.load(tmp_path / "words.toml")


def words_in(source: str, config: Config, path: str = "b.py") -> list[tuple[int, str]]:
    return [(line, word) for line, word, _ in findings(path, source, config)]


def test_words_are_found_in_comments_and_strings_only(config: Config) -> None:
    source = 'told = 1  # it is told\n"""First.\n\nTold again."""\nx = f"{told} was told"\n'

    assert words_in(source, config) == [(1, "told"), (4, "Told"), (5, "told")]


def test_words_are_found_in_every_line_of_other_files(config: Config) -> None:
    assert words_in("one\nis told\ntold_at\n", config, "page.md") == [(2, "told")]


def test_exact_patterns_respect_case(config: Config) -> None:
    assert words_in("Of two\nof two\n", config, "page.md") == [(1, "Of t")]


def test_an_allowed_text_is_ignored_in_its_file_only(config: Config) -> None:
    source = '"""She was told twice, and told."""\n'

    assert words_in(source, config, "a.py") == [(1, "told")]
    assert words_in(source, config, "b.py") == [(1, "told"), (1, "told")]
    assert (config.is_skipped("vendor/x.js"), config.is_skipped("x.js")) == (True, False)


def test_an_exception_needs_a_reason(tmp_path: Path) -> None:
    (tmp_path / "words.toml").write_text(CONFIG.replace('reason = "A title."', ""))

    with pytest.raises(KeyError, match="reason"):
        Config.load(tmp_path / "words.toml")


def test_the_project_rejects_the_old_words() -> None:
    config = Config.load(WORDS)
    old = ["reckoned", "anew", "whoever", "put aside", "learnt", "quantisation", "held-out", "the api"]

    assert [word for word in old if not words_in(f'"""It is {word}."""', config, "x.py")] == []


def test_prose_of_python_has_line_numbers() -> None:
    assert list(prose("a.py", 'x = 1\n# one\ny = """two\nthree"""\n')) == [(2, "# one"), (3, '"""two'), (4, 'three"""')]


def test_sentences_are_counted_outside_code_tables_and_headings() -> None:
    page = "# A heading of five words\n\nOne two three. Four five six seven!\n\n- [A link](x.md) has words\n"
    page += "| a | b c d |\n```sh\nnot prose at all\n```\n"

    assert sentence_lengths(page) == [3, 4, 4]


def test_cells_of_more_than_25_words_are_found() -> None:
    long = "word " * 26
    page = f"| a | {'word ' * 25}|\n| [a link]({'x' * 99}) | {long}|\n"

    assert list(long_cells(page)) == [long.strip()]


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("One two three.\n", 0),
        (f"{'word ' * 16}.\n", 1),  # the mean
        (f"{'word ' * 31}.\n" + "One two three.\n" * 98, 1),  # one long sentence in 99
        (f"{'word ' * 31}.\n" + "One two three.\n" * 99, 0),
        (f"One two three.\n\n| a |\n|---|\n| {'word ' * 26}|\n", 1),
    ],
)
def test_a_folder_above_a_limit_fails(page: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, text in (("short", "One two three.\n" * 999), ("long", page)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "page.md").write_text(text)
    monkeypatch.setattr("sys.argv", ["", *map(str, tmp_path.rglob("*.md"))])

    assert main() == status
