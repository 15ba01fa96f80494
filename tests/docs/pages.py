"""The code blocks of a page, in order, with the output that the page shows for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]+?) -->\n\s*?)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN = "not run: "
"""`<!-- not run: REASON -->` before a block: its commands are only parsed."""
EXAMPLE = "example output"
"""`<!-- example output -->` before a block of output: it is not compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    language: str
    text: str
    line: int
    """The number of the block's first line in the page."""
    not_run: str | None = None
    """The reason why the block is not run."""
    output: str | None = None
    """The output that the page shows directly after the block."""


def pages() -> list[Path]:
    """Return README.md, the FAQ, the tutorials and the how-to guides."""
    folders = [ROOT / "docs" / folder for folder in ("tutorials", "how-to", "internals")]
    found = [page for folder in folders for page in sorted(folder.glob("*.md"))]
    return [ROOT / "README.md", ROOT / "docs/faq.md", *found]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the blocks with shell commands or Python."""
    return [block for block in _with_output(page.read_text("utf-8")) if block.language in {"sh", "python"}]


def _with_output(text: str) -> Iterator[Block]:
    last: Block | None = None
    end = 0
    for match in FENCE.finditer(text):
        mark, indent = match["mark"] or "", len(match["indent"])
        body = "".join(line[indent:] or "\n" for line in match["text"].splitlines(keepends=True))
        is_adjacent = not text[end : match.start()].strip()
        if match["language"] == "text" and last is not None and is_adjacent:
            last = last if mark == EXAMPLE else replace(last, output=body)
        elif match["language"] != "text" or not is_adjacent:
            if last is not None:
                yield last
            reason = mark.removeprefix(NOT_RUN) if mark.startswith(NOT_RUN) else None
            line = text.count("\n", 0, match.start("text")) + 1
            last = Block(language=match["language"], text=body, line=line, not_run=reason)
        end = match.end()
    if last is not None:
        yield last
