"""`make check-words`: prose uses standard technical English. `tools/words.toml` lists the words to avoid.

Prose is every comment and every string of a Python file, and every line of other text files. Python names are not
prose. An underscore counts as a letter, so a pattern for a word does not match names that contain it.
"""

import argparse
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
class Rule:
    pattern: re.Pattern[str]
    use: str


@dataclass(frozen=True)
class Allowed:
    """A text in which a pattern may occur, in the files that match `paths`."""

    paths: str
    text: re.Pattern[str]


@dataclass(frozen=True)
class Config:
    rules: list[Rule]
    allowed: list[Allowed]
    skipped: list[str]

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Load the rules. Raises KeyError for an exception without a reason."""
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        words = {rf"(?i:(?<![\w-])(?:{words})(?![\w-]))": use for words, use in table["avoid"].items()}
        patterns = words | table["avoid_exact"]
        entries = [(entry["paths"], entry["text"], entry["reason"]) for entry in table.get("allow", [])]
        return cls(
            rules=[Rule(re.compile(pattern), use) for pattern, use in patterns.items()],
            allowed=[Allowed(paths, re.compile(text)) for paths, text, _ in entries],
            skipped=[entry["paths"] for entry in table["skip"] if entry["reason"]],
        )

    def is_skipped(self, path: str) -> bool:
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.skipped)


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    word: str
    use: str
    text: str

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: "{self.word}": use {self.use}\n    {self.text.strip()[:160]}'


def prose(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that contain prose, with their numbers from 1."""
    if not path.endswith(".py"):
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in PROSE_TOKENS:
            text = re.sub(r"\{[^{}]*\}", "{}", token.string) if F_STRING.match(token.string) else token.string
            yield from enumerate(text.splitlines(), token.start[0])


def findings(path: str, source: str, config: Config) -> Iterator[Finding]:
    exceptions = [exception.text for exception in config.allowed if fnmatch.fnmatch(path, exception.paths)]
    for number, line in prose(path, source):
        text = line
        for exception in exceptions:
            text = exception.sub("", text)
        for rule in config.rules:
            for match in rule.pattern.finditer(text):
                yield Finding(path, number, match.group().strip(), rule.use, line)


def text_files() -> list[str]:
    """Return tracked and new text files, relative to the root."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.splitlines() if Path(path).suffix in SUFFIXES or Path(path).name in NAMES]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="only files whose path begins with one of these")
    parser.add_argument("--all", action="store_true", help="also files that words.toml skips")
    parser.add_argument("--count", action="store_true", help="print the number of findings for each word")
    arguments = parser.parse_args()
    config = Config.load(WORDS)
    prefixes = tuple(path.removeprefix("./") for path in arguments.paths)
    chosen = [path for path in text_files() if path.startswith(prefixes or "")]
    found = [
        finding
        for path in chosen
        if arguments.all or not config.is_skipped(path)
        for finding in findings(path, (ROOT / path).read_text(encoding="utf-8"), config)
    ]
    if arguments.count:
        counts: dict[str, int] = {}
        for finding in found:
            counts[finding.word.lower()] = counts.get(finding.word.lower(), 0) + 1
        for word, count in sorted(counts.items(), key=lambda item: -item[1]):
            print(count, word)
    else:
        for finding in found:
            print(finding)
    print(f"{len(found)} words to replace in {len(chosen)} files.", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
