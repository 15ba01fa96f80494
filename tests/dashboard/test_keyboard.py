"""Keyboard operation of the pages: a sensible order, a visible focus, and no focus trap."""

from __future__ import annotations

from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service
from tests.dashboard.visitor import Visitor

OUTLINE = "(({outlineStyle: a, outlineWidth: b}) => `${a} ${b}`)(getComputedStyle(document.activeElement))"
FOCUSED = "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || '').trim()"


def test_job_list_is_usable_with_the_keyboard_alone(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open("#/jobs")
    visitor.page.get_by_role("link", name="docstrings-r16").wait_for()

    assert _tab(visitor) == "Skip to the content"
    _tab_to(visitor, "Succeeded")
    visitor.page.keyboard.press("Enter")
    _tab_to(visitor, "docstrings-r16")
    visitor.page.keyboard.press("Enter")

    visitor.page.get_by_role("heading", name="docstrings-r16", level=1).wait_for()
    assert visitor.page.evaluate(FOCUSED) == "docstrings-r16"
    assert visitor.page.title().endswith("Lorry")


def test_skip_link_skips_the_navigation(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open("#/jobs")

    _tab(visitor)
    visitor.page.keyboard.press("Enter")

    assert visitor.page.evaluate("document.activeElement.tagName") == "H1"


def test_every_focused_element_has_a_visible_outline(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open("#/jobs")
    visitor.page.get_by_role("link", name="docstrings-r16").wait_for()

    seen = set[str]()
    while (name := _tab(visitor)) not in seen and name:
        seen.add(name)
        style = visitor.page.evaluate(OUTLINE)
        assert style == "solid 2px", name

    assert {"Jobs", "Queue", "Adapters", "Workers", "Sign out", "titles-r16"} <= seen


def _tab(visitor: Visitor) -> str:
    visitor.page.keyboard.press("Tab")
    return str(visitor.page.evaluate(FOCUSED)).splitlines()[0] if visitor.page.evaluate(FOCUSED) else ""


def _tab_to(visitor: Visitor, name: str) -> None:
    for _ in range(60):
        if _tab(visitor).startswith(name):
            return
    raise AssertionError(f"{name!r} is not reached by the Tab key")
