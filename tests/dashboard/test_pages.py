"""Every page fits its window, is accessible, works with the keyboard and follows the content security policy."""

from __future__ import annotations

import pytest

from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service
from tests.dashboard.visitor import Visitor

PLACES = {
    "jobs": "#/jobs",
    "running job": "#/jobs/titles-r16",
    "failed job": "#/jobs/hot-lr",
    "queued job": "#/jobs/nightly-b",
    "queue": "#/queue",
    "adapters": "#/adapters",
    "adapter": "#/adapters/docstrings-r16",
    "models": "#/models",
    "files": "#/files",
    "workers": "#/workers",
    "no such page": "#/nowhere",
}
LAYOUTS = [(1280, "light"), (390, "dark")]
OTHER_LAYOUTS = [(1280, "dark"), (390, "light")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_page_fits_its_window_and_is_accessible(
    filled: Service, visit: Visit, place: str, width: int, scheme: str
) -> None:
    visitor = visit(filled, width=width, scheme=scheme)

    visitor.open(filled.address(PLACES[place]))
    visitor.page.wait_for_load_state("load")

    visitor.assert_fits()
    visitor.assert_accessible()


@pytest.mark.parametrize(("width", "scheme"), [*OTHER_LAYOUTS, (320, "light"), (740, "dark"), (870, "light")])
def test_no_page_is_wider_than_its_window_in_other_layouts(
    filled: Service, visit: Visit, width: int, scheme: str
) -> None:
    visitor = visit(filled, width=width, scheme=scheme)

    for place in PLACES.values():
        visitor.open(filled.address(place))

        visitor.assert_fits()


@pytest.mark.parametrize(("width", "scheme"), [*LAYOUTS, *OTHER_LAYOUTS])
def test_sign_in_page_fits_its_window_and_is_accessible(filled: Service, visit: Visit, width: int, scheme: str) -> None:
    visitor = visit(filled, width=width, scheme=scheme, signed_in=False)

    visitor.open("#/jobs")

    visitor.page.get_by_role("heading", name="Sign in to Lorry").wait_for()
    visitor.assert_fits()
    visitor.assert_accessible()


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("#/jobs", "lorry jobs submit smollm2-135m train.jsonl"),
        ("#/queue", "lorry jobs submit"),
        ("#/adapters", "lorry jobs submit"),
    ],
)
def test_empty_page_names_the_next_command(fresh: Service, visit: Visit, place: str, command: str) -> None:
    visitor = visit(fresh)

    visitor.open(place)

    assert command in visitor.text()
    visitor.assert_accessible()


def test_chosen_colors_are_remembered(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, scheme="light")
    visitor.open("#/jobs")
    button = visitor.page.get_by_role("button", name="Colors")

    button.click()
    button.click()
    visitor.page.reload()
    visitor.page.locator("main h1").wait_for()

    assert _background(visitor) == "rgb(19, 23, 24)"


def _background(visitor: Visitor) -> str:
    return str(visitor.page.evaluate("getComputedStyle(document.body).backgroundColor"))


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
