"""Checks the lengths of sentences and table cells in Markdown files against limits of the style guide, by folder."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LONGEST_MEAN = 15
LONG = 30
MOST_LONG = 0.01
"""Fraction of a folder's sentences that may be longer than LONG."""
LONGEST_CELL = 25
FEWEST_WORDS = 3
"""A shorter text is a label, not a sentence."""
CODE_OR_COMMENT = re.compile(r"```.*?```|<!--.*?-->", re.DOTALL)
NOT_PROSE = ("|", "#", "!", "<")


def sentence_lengths(markdown: str) -> list[int]:
    """Return the number of words of each sentence outside code, tables and headings."""
    lengths: list[int] = []
    for line in CODE_OR_COMMENT.sub("", markdown).splitlines():
        text = line.strip()
        if not text.startswith(NOT_PROSE):
            text = re.sub(r"^([-*>]|\d+\.)\s+", "", text)
            lengths += [_num_words(sentence) for sentence in re.split(r"(?<=[.!?])\s+", _plain(text))]
    return [length for length in lengths if length >= FEWEST_WORDS]


def long_cells(markdown: str) -> Iterator[str]:
    """Yield each table cell of more than LONGEST_CELL words."""
    for line in CODE_OR_COMMENT.sub("", markdown).splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", _plain(line))[1:-1]
            yield from (cell.strip() for cell in cells if _num_words(cell) > LONGEST_CELL)


def main() -> int:
    folders: dict[Path, list[int]] = defaultdict(list)
    num_problems = 0
    for path in map(Path, sys.argv[1:]):
        markdown = path.read_text(encoding="utf-8")
        folders[path.parent] += sentence_lengths(markdown)
        for cell in long_cells(markdown):
            print(f"{path}: {_num_words(cell)} words in a table cell: {cell}")
            num_problems += 1
    for folder, lengths in sorted(folders.items()):
        number = max(1, len(lengths))
        mean, part = sum(lengths) / number, sum(length > LONG for length in lengths) / number
        if mean > LONGEST_MEAN or part > MOST_LONG:
            print(f"{folder}: {mean:.1f} words per sentence, {part:.1%} of the sentences have more than {LONG}")
            num_problems += 1
    return 1 if num_problems else 0


def _plain(text: str) -> str:
    """Return the text without targets of links; code counts as one word."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def _num_words(text: str) -> int:
    return len(re.findall(r"\w[\w'-]*", text))


if __name__ == "__main__":
    sys.exit(main())
