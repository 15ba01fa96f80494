"""Reports the lengths of sentences in Markdown files, and long table cells. Exits with 1 if a folder exceeds the limits
of the style guide."""

import argparse
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
        if text.startswith(NOT_PROSE):
            continue
        text = re.sub(r"^([-*>]|\d+\.)\s+", "", text)
        words = [_num_words(sentence) for sentence in re.split(r"(?<=[.!?])\s+", _plain(text))]
        lengths += [count for count in words if count >= FEWEST_WORDS]
    return lengths


def long_cells(markdown: str) -> Iterator[str]:
    """Yield each table cell of more than LONGEST_CELL words."""
    for line in CODE_OR_COMMENT.sub("", markdown).splitlines():
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", _plain(line))[1:-1]:
                if _num_words(cell) > LONGEST_CELL:
                    yield cell.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(".")[0])
    parser.add_argument("files", nargs="+", type=Path)
    folders: dict[Path, list[int]] = defaultdict(list)
    cells: list[str] = []
    for path in parser.parse_args().files:
        markdown = path.read_text(encoding="utf-8")
        lengths = sentence_lengths(markdown)
        folders[path.parent] += lengths
        cells += [f"{path}: {_num_words(cell)} words in a table cell: {cell}" for cell in long_cells(markdown)]
        if lengths:
            print(f"{path}: {_summary(lengths)}")
    for folder, lengths in sorted(folders.items()):
        print(f"{'FAILED: ' * (not _is_readable(lengths))}folder {folder}: {_summary(lengths)}")
    print(*cells, sep="\n", file=sys.stderr)
    return 0 if not cells and all(map(_is_readable, folders.values())) else 1


def _plain(text: str) -> str:
    """Return the text without targets of links; code counts as one word."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`]*`", "code", text)


def _num_words(text: str) -> int:
    return len(re.findall(r"\w[\w'-]*", text))


def _is_readable(lengths: list[int]) -> bool:
    return _mean(lengths) <= LONGEST_MEAN and _fraction_of_long(lengths) <= MOST_LONG


def _summary(lengths: list[int]) -> str:
    return (
        f"{len(lengths)} sentences, {_mean(lengths):.1f} words on average, "
        f"{_fraction_of_long(lengths):.1%} longer than {LONG} words, longest {max(lengths, default=0)}"
    )


def _mean(lengths: list[int]) -> float:
    return sum(lengths) / max(1, len(lengths))


def _fraction_of_long(lengths: list[int]) -> float:
    return sum(length > LONG for length in lengths) / max(1, len(lengths))


if __name__ == "__main__":
    sys.exit(main())
