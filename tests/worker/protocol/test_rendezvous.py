"""The address at which the trainers of a gang meet. Invalid ones are rejected before any trainer starts."""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from types import SimpleNamespace

import pytest

from worker.protocol.rendezvous import place_of


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.0.0.12", "would listen on 10.0.0.11, the first address of eth0"),
        ("fd00::2", "must be an IPv4 address"),
        ("node-a", "must be an IPv4 address"),
        ("10.0.0.13", "no network interface of this node has that address"),
    ],
)
def test_an_address_at_which_a_trainer_would_not_listen_is_rejected(address: str, why: str) -> None:
    found = ((AF_INET, "10.0.0.11"), (AF_INET, "10.0.0.12"), (AF_INET6, "fd00::2"))
    interfaces = {"eth0": [SimpleNamespace(family=family, address=text) for family, text in found]}

    assert place_of("10.0.0.11", interfaces) == ("10.0.0.11", "eth0")
    with pytest.raises(SystemExit, match=why):
        place_of(address, interfaces)
