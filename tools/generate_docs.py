"""Writes the reference pages and CLI options that are generated from the code: `make docs`. `--check` compares."""

import argparse
import html
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from tools import (
    benchmark_page,
    job_options,
    reference_api,
    reference_cli,
    reference_fields,
    reference_memory,
    reference_sdk,
    sdk_types,
)
from tools.error_catalog import error_messages, is_bare

ROOT = Path(__file__).parents[1]


def errors() -> str:
    """One section for each code, so that `doc_url` can point to it."""
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


def errors_page() -> str:
    """The same entries as a page of the dashboard, to which every error's `doc_url` points."""
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


PAGES: dict[str, Callable[[], str]] = {
    "lorry/cli/parsing/job_options.json": job_options.job_options,
    "lorry/models.py": sdk_types.models,
    "lorry/requests.py": sdk_types.requests,
    "docs/reference/cli.md": reference_cli.page,
    "docs/reference/errors.md": errors,
    "dashboard/errors.html": errors_page,
    **reference_api.pages(),
    "docs/benchmarks.md": benchmark_page.page,
}
JOB_FIELD_BLOCKS = {name: partial(reference_fields.job_fields, name) for name in reference_fields.JOB_FIELDS}
SETTING_BLOCKS = {name: partial(reference_fields.settings, name) for name in reference_fields.SETTINGS}
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/reference/job-fields.md": {**JOB_FIELD_BLOCKS},
    "docs/reference/settings.md": {**SETTING_BLOCKS, "api-server": reference_fields.api_settings},
    "docs/reference/python-sdk.md": {
        "resources": reference_sdk.resources,
        "functions": reference_sdk.functions,
        "errors": reference_sdk.errors,
        "objects": reference_sdk.objects,
    },
    "docs/how-to/which-gpu.md": {
        "memory": reference_memory.memory_of_jobs,
        "packs": reference_memory.packs,
        "rates": reference_memory.rates,
        "cards": reference_memory.cards,
    },
}
"""Generated parts of pages that are otherwise written by hand, by the name in their comments."""
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->)\n.*?\n(<!-- end of \2 -->)", re.DOTALL)


def with_blocks(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    """Return a page with its generated parts replaced. Raises ValueError unless it has each of them once."""
    named = [match[2] for match in BLOCK.finditer(text)]
    if sorted(named) != sorted(blocks):
        raise ValueError(f"the page has the generated parts {named}, not {list(blocks)}")
    return BLOCK.sub(lambda match: f"{match[1]}\n\n{blocks[match[2]]()}\n\n{match[3]}", text)


def _page_with_blocks(path: Path, blocks: dict[str, Callable[[], str]]) -> str:
    return with_blocks(path.read_text(encoding="utf-8"), blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page differs from the code")
    is_check = parser.parse_args().check
    outdated: list[str] = []
    partly = {name: partial(_page_with_blocks, ROOT / name, blocks) for name, blocks in BLOCKS.items()}
    for name, write in (PAGES | partly).items():
        path, text = ROOT / name, write()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        outdated.append(name)
        if not is_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in outdated:
        print(f"{name} does not match the code. Run: make docs" if is_check else f"wrote {name}")
    bare = sorted({each.code for each in error_messages() if is_bare(each.message) or is_bare(each.remedy)})
    for code in bare:
        print(f"{code}: a message or fix is only a placeholder. Add its text to EXPLANATIONS in tools/error_catalog.py")
    return 1 if bare or (is_check and outdated) else 0


if __name__ == "__main__":
    sys.exit(main())
