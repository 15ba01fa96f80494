"""How the trainers of a gang find each other: by their settings, and by the port that the leader's trainer reports.

This module contains both ends of the settings and the port, so that they agree.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from worker.protocol.mailbox import Json, TrainerDirectory, read_json, write_json

Interfaces = Mapping[str, Sequence[Any]]
"""Network interfaces as psutil reports them: each has addresses with their families."""
PORT_FILE = "port.json"
RANKS_FILE = "TRAINER_RANKS_FILE"
"""Environment variable with the path of the file by which processes that were launched together on one machine connect
to each other."""


def meeting_settings(
    *, address: str, interface: str, port: int | None, name: str, first_rank: int, num_ranks: int
) -> Json:
    """Return the rendezvous settings for trainer.json. port None: for the leader, whose trainer chooses a port."""
    where = {"address": address, "interface": interface, "port": port}
    return where | {"name": name, "first_rank": first_rank, "num_ranks": num_ranks}


def ranks_file() -> Path | None:
    """Return the file of RANKS_FILE. None if this process was launched alone or manually."""
    path = os.environ.get(RANKS_FILE)
    return Path(path) if path else None


def report_port(directory: TrainerDirectory, port: int) -> None:
    """Report the port on which this trainer listens."""
    write_json(directory.path / PORT_FILE, {"port": port})


def reported_port(directory: TrainerDirectory) -> int | None:
    """Return the port on which the trainer of this directory listens. None as long as it has not reported one."""
    with contextlib.suppress(FileNotFoundError):
        return int(read_json(directory.path / PORT_FILE)["port"])
    return None


def place_of(address: str | None, interfaces: Interfaces | None = None) -> tuple[str, str]:
    """Return the address at which other nodes of the gang reach this one, and its network interface.

    Raises SystemExit if torch would listen on another address: torch gets the interface, and uses the first IPv4
    address of it.
    """
    if address is None:
        raise SystemExit(
            "LORRY_GANG requires LORRY_ADVERTISE_ADDRESS, at which other nodes of the gang reach this one."
        )
    if not _is_ipv4(address):
        raise SystemExit(f"LORRY_ADVERTISE_ADDRESS is {address}, but must be an IPv4 address, for example 10.0.0.11.")
    for name, addresses in (psutil.net_if_addrs() if interfaces is None else interfaces).items():
        own = [found.address for found in addresses if found.family == socket.AF_INET]
        if address in own and address != own[0]:
            raise SystemExit(
                f"LORRY_ADVERTISE_ADDRESS is {address}, but trainers would listen on {own[0]}, the first address of "
                f"{name}. Advertise that address, or assign {address} to an interface of its own."
            )
        if address in own:
            return address, name
    raise SystemExit(f"LORRY_ADVERTISE_ADDRESS is {address}, but no network interface of this node has that address.")


def _is_ipv4(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 4
    except ValueError:
        return False
