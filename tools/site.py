"""The hook of MkDocs that mkdocs.yml names: adds the generated pages, fills in the generated parts of other pages, and
excludes pages for contributors from the search.

A page asks for a part with `<!-- generated: settings data_dir redis_url -->`: a function in PARTS, and its arguments.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[1]))  # MkDocs loads this file alone

from tools import benchmark_tables, error_reference, reference_api, reference_cli, reference_fields, reference_memory

INTERNALS = ("internals/", "decisions/", "contributing/")
PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": reference_cli.page,
    "reference/errors.md": error_reference.markdown,
    **reference_api.pages(),
}
PARTS: dict[str, Callable[..., str]] = {
    "job_fields": reference_fields.job_fields,
    "settings": reference_fields.settings,
    "api_settings": reference_fields.api_settings,
    "memory_of_jobs": reference_memory.memory_of_jobs,
    "jobs_per_trainer": reference_memory.packs,
    "rates": reference_memory.rates,
    "cards": reference_memory.cards,
    "benchmark": benchmark_tables.benchmark,
    "missed_goals": benchmark_tables.missed_goals,
}
PART = re.compile(r"<!-- generated: (\w+)([\w -]*?) -->")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    if page.file.src_uri.startswith(INTERNALS):
        page.meta["search"] = {"exclude": True}
    return with_parts(markdown)


def with_parts(markdown: str) -> str:
    """Return a page with its generated parts."""
    return PART.sub(lambda match: PARTS[match[1]](*match[2].split()), markdown)
