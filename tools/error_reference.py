"""The reference of errors and warnings: a page of the documentation, and a page of the dashboard.

The texts come from the tables of catalog and of the client. The engine, a library, has one entry for each error class.
"""

import html
import inspect
import string
from dataclasses import dataclass
from itertools import groupby

from catalog.error_texts import templates
from lora_core.errors import LoraCoreError
from lorry.errors import templates as client_templates

ENGINE_REMEDY = "Follow the fix in the message. It depends on the job's settings, its files or its base model."


@dataclass(frozen=True, order=True)
class ErrorEntry:
    """One text of a code. `message` and `remedy` are templates: `{name}` stands for a value."""

    code: str
    message: str
    remedy: str


def entries() -> list[ErrorEntry]:
    """Return all texts, sorted by code."""
    found = {ErrorEntry(text.code, text.message, text.remedy) for text in templates().values()}
    for name, text in client_templates().items():
        found.add(ErrorEntry(text.get("code", name), text["message"], text["remedy"]))
    for error in LoraCoreError.__subclasses__():
        if error.__module__ == LoraCoreError.__module__:
            sentence = (inspect.getdoc(error) or "").partition("\n")[0]
            found.add(ErrorEntry(error.code, sentence, ENGINE_REMEDY))
    return sorted(found)


def markdown() -> str:
    """One section for each code, so that other pages can link to it."""
    parts = [
        "# Errors and warnings",
        "",
        "Every error response has `message`, `remedy`, `type`, `param`, `code` and `doc_url`. Program against `code`: "
        "messages may change. `{name}` stands for a value. Plans and jobs return the warnings in `warnings`.",
        "",
    ]
    for code, texts in groupby(entries(), key=lambda entry: entry.code):
        parts += [f"## {code}", ""]
        parts += [f"- {_escape(text.message)}  \n  *Fix:* {_escape(text.remedy)}" for text in texts]
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
    for code, texts in groupby(entries(), key=lambda entry: entry.code):
        parts.append(f'<section id="{code}"><h2><code>{code}</code></h2><dl>')
        parts += [f"<dt>{html.escape(_plain(text.message))}<dd>{html.escape(_plain(text.remedy))}" for text in texts]
        parts.append("</dl></section>")
    return "\n".join([*parts, "</html>"]) + "\n"


def _escape(text: str) -> str:
    return _plain(text).replace("<", "&lt;").replace("*", "\\*")


def _plain(template: str) -> str:
    """Return a template without conversions and format specifications: `{name}` for `{name!r}` or `{name:,}`."""
    parts = string.Formatter().parse(" ".join(template.split()))
    return "".join(literal + ("" if field is None else f"{{{field}}}") for literal, field, _, _ in parts)
