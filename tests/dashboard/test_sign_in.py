"""Signing in with a one-time link or a key, and signing out."""

from __future__ import annotations

import httpx

from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_one_time_link_names_project_and_key_and_signs_in(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, signed_in=False)
    link = filled.sign_in_link()

    visitor.page.goto(link)
    visitor.page.get_by_role("button", name="Sign in to default").wait_for()
    assert "This link signs this browser in to the project default with the key first operator key" in visitor.text()
    visitor.assert_fits()
    visitor.assert_accessible()
    visitor.page.get_by_role("button", name="Sign in to default").click()

    visitor.page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    visitor.page.get_by_role("link", name="titles-r16").first.wait_for()
    assert link.rpartition("/")[2] not in visitor.page.url
    assert visitor.page.locator("header .who").inner_text().endswith("default")


def test_previewing_a_link_does_not_use_it_up(filled: Service, visit: Visit) -> None:
    link = filled.sign_in_link()
    for _ in range(2):
        visit(filled, signed_in=False).page.goto(link)
    assert httpx.get(link, timeout=60, trust_env=False).status_code == 200

    visitor = visit(filled, signed_in=False)
    visitor.page.goto(link)
    visitor.page.get_by_role("button", name="Sign in to default").click()

    visitor.page.get_by_role("heading", name="Jobs", exact=True).wait_for()


def test_used_link_is_explained_and_offers_the_key_form(filled: Service, visit: Visit) -> None:
    link = filled.sign_in_link()
    first = visit(filled, signed_in=False)
    first.page.goto(link)
    first.page.get_by_role("button", name="Sign in to default").click()
    first.page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    visitor = visit(filled, signed_in=False)

    visitor.page.goto(link)

    visitor.page.get_by_text("This sign-in link was already used, has expired").wait_for()
    visitor.page.get_by_role("link", name="Sign in with an API key").click()
    visitor.page.get_by_label("API key").wait_for()


def test_foreign_link_replaces_a_session_only_with_consent(fresh: Service, visit: Visit) -> None:
    theirs = fresh.link_of_another_project("attacker")
    visitor = visit(fresh)
    visitor.open("#/jobs")

    visitor.page.goto(theirs)
    visitor.page.get_by_text("You are signed in to the project default").wait_for()
    assert "in to the project attacker with the key lure" in visitor.text()
    visitor.assert_accessible()
    visitor.page.get_by_role("link", name="Stay in default").click()
    visitor.page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    assert visitor.page.locator("header .who").inner_text().endswith("default")

    visitor.page.goto(theirs)
    visitor.page.get_by_role("button", name="Switch to attacker").click()
    visitor.page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    visitor.page.get_by_text("attacker").wait_for()


def test_used_link_keeps_the_current_session(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)

    visitor.page.goto(f"{filled.url}/dashboard/#/sign-in/used-already")

    visitor.page.get_by_text("This sign-in link was already used, has expired").wait_for()
    visitor.page.get_by_role("link", name="Stay in default").click()
    visitor.page.get_by_role("heading", name="Jobs", exact=True).wait_for()


def test_key_signs_in_and_opens_the_requested_page(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, signed_in=False)
    visitor.open("#/workers")

    visitor.page.get_by_label("API key").fill(filled.seeded.api_key)
    visitor.page.keyboard.press("Enter")

    visitor.page.get_by_role("heading", name="Workers").wait_for()
    assert filled.seeded.api_key not in visitor.page.content()


def test_wrong_key_shows_an_error_and_keeps_the_focus(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, signed_in=False)
    visitor.open("#/jobs")

    visitor.page.get_by_label("API key").fill("lorry_key_wrong")
    visitor.page.get_by_role("button", name="Sign in").click()

    visitor.page.get_by_text("The API key is not valid.").wait_for()
    assert visitor.page.evaluate("document.activeElement.id") == "key"


def test_signing_out_ends_the_session(filled: Service, visit: Visit) -> None:
    visitor = visit(filled)
    visitor.open("#/jobs")

    visitor.page.get_by_role("button", name="Sign out").click()

    visitor.page.get_by_role("heading", name="Sign in to Lorry").wait_for()
    visitor.open("#/jobs")
    visitor.page.get_by_role("heading", name="Sign in to Lorry").wait_for()
