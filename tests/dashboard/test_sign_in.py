"""Coming in by a one-time link or with a key, and going out."""

from __future__ import annotations

from tests.dashboard.conftest import Visit
from tests.dashboard.service import Service


def test_a_one_time_link_leads_to_the_jobs(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, signed_in=False)

    visitor.page.goto(filled.sign_in_link())

    visitor.page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    visitor.page.get_by_role("link", name="titles-r16").first.wait_for()
    assert "token" not in visitor.page.url


def test_a_link_that_was_used_leads_to_the_sign_in_page_and_says_so(filled: Service, visit: Visit) -> None:
    link = filled.sign_in_link()
    visit(filled, signed_in=False).page.goto(link)
    visitor = visit(filled, signed_in=False)

    visitor.page.goto(link)

    visitor.page.get_by_text("This sign-in link was used already or has expired.").wait_for()


def test_a_key_signs_in_and_leads_to_the_page_that_was_asked_for(filled: Service, visit: Visit) -> None:
    visitor = visit(filled, signed_in=False)
    visitor.open("#/workers")

    visitor.page.get_by_label("API key").fill(filled.seeded.api_key)
    visitor.page.keyboard.press("Enter")

    visitor.page.get_by_role("heading", name="Workers").wait_for()
    assert filled.seeded.api_key not in visitor.page.content()


def test_a_wrong_key_is_told_with_a_remedy_and_the_field_keeps_the_focus(filled: Service, visit: Visit) -> None:
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
