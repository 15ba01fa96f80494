"""Excludes pages for contributors from the search of the documentation site. mkdocs.yml names this hook."""

from mkdocs.structure.pages import Page

INTERNALS = ("internals/", "decisions/", "contributing/")


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    if page.file.src_uri.startswith(INTERNALS):
        page.meta["search"] = {"exclude": True}
    return markdown
