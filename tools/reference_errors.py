"""The reference of errors and warnings: a page of the documentation, and a page of the dashboard."""

import html
from collections.abc import Iterator
from itertools import groupby

from tools.error_catalog import error_messages


def markdown() -> str:
    """One section for each code, so that other pages can link to it."""
    parts = [
        "# Errors and warnings",
        "",
        "Every error response has `message`, `remedy`, `type`, `param`, `code` and `doc_url`. Program against `code`: "
        "messages may change. `{name}` stands for a value. Plans and jobs return the warnings in `warnings`.",
        "",
    ]
    for code, entries in _by_code():
        parts += [f"## {code}", ""]
        for message, remedy in entries:
            parts.append(f"- {_escape(message)}" + (f"  \n  *Fix:* {_escape(remedy)}" if remedy else ""))
        parts.append("")
    return "\n".join(parts)


def dashboard_page() -> str:
    """The same entries as HTML, to which every error's `doc_url` points."""
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>Errors - Lorry</title>",
        '<link rel="stylesheet" href="style/theme.css">',
        '<link rel="stylesheet" href="style/errors.css">',
        "<h1>Errors and warnings</h1>",
    ]
    for code, entries in _by_code():
        parts.append(f'<section id="{code}"><h2><code>{code}</code></h2><dl>')
        parts += [f"<dt>{html.escape(message)}<dd>{html.escape(remedy)}" for message, remedy in entries]
        parts.append("</dl></section>")
    return "\n".join([*parts, "</html>"]) + "\n"


def _by_code() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (code, [(message, remedy)])."""
    for code, entries in groupby(error_messages(), key=lambda entry: entry.code):
        yield code, list(dict.fromkeys((_line(entry.message), _line(entry.remedy)) for entry in entries))


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*")


def _line(text: str) -> str:
    return " ".join(text.split())
