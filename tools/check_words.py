"""`make check-words`: prose uses standard technical English. `tools/words.toml` lists the words to avoid.

Prose is every comment and every string of a Python file, and every line of other text files. Python names are not
prose. An underscore counts as a letter, so a pattern for a word does not match names that contain it.
"""

import fnmatch
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = ROOT / "tools" / "words.toml"
SUFFIXES = {".py", ".js", ".html", ".css", ".md", ".yml", ".yaml", ".toml", ".json", ".sh", ".txt", ".service", ".svg"}
NAMES = {"Makefile", "Dockerfile", ".env.example"}
F_STRING = re.compile("(?i:r?fr?)['\"]")
"""Before Python 3.12, an f-string with the code in its braces is one token."""
PROSE_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}


@dataclass(frozen=True)
class Config:
    rules: list[tuple[re.Pattern[str], str]]
    """Patterns, and the words to use instead."""
    allowed: list[tuple[str, re.Pattern[str]]]
    """Files, and a text in them in which a pattern may occur."""
    skipped: list[str]

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Load the rules. Raises KeyError for an exception without a reason."""
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        words = {rf"(?i:(?<![\w-])(?:{words})(?![\w-]))": use for words, use in table["avoid"].items()}
        allowed = [(entry["paths"], entry["text"], entry["reason"]) for entry in table.get("allow", [])]
        return cls(
            rules=[(re.compile(pattern), use) for pattern, use in (words | table["avoid_exact"]).items()],
            allowed=[(paths, re.compile(text)) for paths, text, _ in allowed],
            skipped=[entry["paths"] for entry in table["skip"] if entry["reason"]],
        )

    def is_skipped(self, path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.skipped)


def findings(path: str, source: str, config: Config) -> Iterator[tuple[int, str, str]]:
    """Yield the number of a line, a word in it, and the words to use instead."""
    allowed = [text for paths, text in config.allowed if fnmatch.fnmatch(path, paths)]
    for number, line in prose(path, source):
        text = line
        for each in allowed:
            text = each.sub("", text)
        for pattern, use in config.rules:
            yield from ((number, match.group().strip(), use) for match in pattern.finditer(text))


def prose(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that contain prose, with their numbers from 1."""
    if not path.endswith(".py"):
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in PROSE_TOKENS:
            text = re.sub(r"\{[^{}]*\}", "{}", token.string) if F_STRING.match(token.string) else token.string
            yield from enumerate(text.splitlines(), token.start[0])


def main() -> int:
    config = Config.load(WORDS)
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    num_found = 0
    for path in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        file = ROOT / path
        is_text = file.suffix in SUFFIXES or file.name in NAMES
        if is_text and file.exists() and not config.is_skipped(path):
            for line, word, use in findings(path, file.read_text(encoding="utf-8"), config):
                print(f'{path}:{line}: "{word}": use {use}')
                num_found += 1
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
