"""Reports the lengths of sentences in Markdown files. Exits with 1 if they exceed the limits of the style guide."""

import argparse
import re
import sys
from pathlib import Path

LONGEST_MEAN = 20
LONG = 35
MOST_LONG = 0.05
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
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"`[^`]*`", "code", text)
        words = [len(re.findall(r"\w[\w'-]*", sentence)) for sentence in re.split(r"(?<=[.!?])\s+", text)]
        lengths += [count for count in words if count >= FEWEST_WORDS]
    return lengths


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(".")[0])
    parser.add_argument("files", nargs="+", type=Path)
    everything: list[int] = []
    for path in parser.parse_args().files:
        lengths = sentence_lengths(path.read_text(encoding="utf-8"))
        everything += lengths
        if lengths:
            print(f"{path}: {_summary(lengths)}")
    print(f"all: {_summary(everything)}")
    return 1 if _mean(everything) > LONGEST_MEAN or _part_of_long(everything) > MOST_LONG else 0


def _summary(lengths: list[int]) -> str:
    return (
        f"{len(lengths)} sentences, {_mean(lengths):.1f} words on average, "
        f"{_part_of_long(lengths):.1%} longer than {LONG} words, longest {max(lengths)}"
    )


def _mean(lengths: list[int]) -> float:
    return sum(lengths) / max(1, len(lengths))


def _part_of_long(lengths: list[int]) -> float:
    return sum(length > LONG for length in lengths) / max(1, len(lengths))


if __name__ == "__main__":
    sys.exit(main())
