"""Every page fits its window, is accessible and follows the content security policy, in all layouts."""

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
