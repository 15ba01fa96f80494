"""Webhook URLs are encrypted under the pepper and bound to their row."""

from __future__ import annotations

import pytest

from catalog.tables.webhooks import WebhookEndpoint
from catalog.webhooks import endpoints, signing
from catalog.webhooks.endpoints import EndpointChange
from catalog.webhooks.signing import UrlLost
from tests.catalog.hooks import Hooks
from tests.catalog.world import PEPPER, World

URL = "https://hooks.example.com/services/T0AB/k3yIn7heP4th-z9Xq"
NEW = b"n" * 32


def test_sealed_url_opens_only_in_its_own_row(world: World) -> None:
    hooks = Hooks(world)
    first, _ = hooks.more(url=URL)

    assert signing.get(first, peppers=[PEPPER.current]) == URL
    assert (first.url, URL in str(first.sealed_url)) == ("https://hooks.example.com/…z9Xq", False)
    copied = WebhookEndpoint(id=hooks.row.id, sealed_url=first.sealed_url, url=first.url)
    with pytest.raises(UrlLost):
        signing.get(copied, peppers=[PEPPER.current])


def test_urls_of_the_previous_pepper_are_sealed_with_the_current_one(world: World) -> None:
    hooks = Hooks(world)
    previous, lost, damaged = (hooks.more(url=URL)[0] for _ in range(3))
    with world.db.write() as session:
        signing.put(session.get_one(WebhookEndpoint, lost.id), URL, peppers=[b"x" * 32])
        session.get_one(WebhookEndpoint, damaged.id).sealed_url = "no base64!"

    num_sealed = [signing.seal_all(world.db, peppers=[NEW, PEPPER.current]) for _ in range(2)]

    assert num_sealed == [2, 0], "the endpoint of `hooks`, and one of these"
    with world.db.read() as session:
        row = session.get_one(WebhookEndpoint, previous.id)
        assert signing.get(row, peppers=[NEW]) == URL
        assert row.url == "https://hooks.example.com/…z9Xq"
        for endpoint_id in (lost.id, damaged.id):
            with pytest.raises(UrlLost, match=f"webhook endpoint {endpoint_id} can't be decrypted"):
                signing.get(session.get_one(WebhookEndpoint, endpoint_id), peppers=[NEW, PEPPER.current])


def test_lost_url_is_reported_and_can_be_set_again(world: World) -> None:
    hooks = Hooks(world)
    with world.db.write() as session:
        signing.put(session.get_one(WebhookEndpoint, hooks.row.id), URL, peppers=[NEW])
    hooks.end_job()

    assert [claimed.url for claimed in hooks.claim()] == [None]
    row = endpoints.change(world.db, **hooks.ident, changes=EndpointChange(url=URL), pepper=PEPPER)
    assert signing.get(row, peppers=[PEPPER.current]) == URL


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "https://hooks.example.com/…z9Xq"),
        ("https://example.com/hooks", "https://example.com/…"),
        ("https://example.com", "https://example.com/…"),
        ("http://[2001:db8::1]:8080/a?token=abcdefgh", "http://[2001:db8::1]:8080/…efgh"),
    ],
)
def test_only_host_and_last_four_characters_are_shown(url: str, shown: str) -> None:
    assert signing.shown(url) == shown
