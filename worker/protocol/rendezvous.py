"""How the trainers of a gang's members find each other: what their settings say, and the port that the leader's tells.

Settings and port are written and read here, so that both ends agree; the trainer's own part is in apart.
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
"""As psutil tells of them: each has addresses, with their families."""
PORT_FILE = "port.json"
RANKS_FILE = "TRAINER_RANKS_FILE"
"""Variable that names the file by which the processes meet that were launched together on one machine."""


def meeting_settings(
    *, address: str, interface: str, port: int | None, name: str, first_rank: int, num_ranks: int
) -> Json:
    """Of trainer.json. port None: of the leader, whose trainer chooses one."""
    where = {"address": address, "interface": interface, "port": port}
    return where | {"name": name, "first_rank": first_rank, "num_ranks": num_ranks}


def ranks_file() -> Path | None:
    """Of this process; None where it was launched by itself, or by hand."""
    path = os.environ.get(RANKS_FILE)
    return Path(path) if path else None


def report_port(directory: TrainerDirectory, port: int) -> None:
    """By the trainer, of itself."""
    write_json(directory.path / PORT_FILE, {"port": port})


def reported_port(directory: TrainerDirectory) -> int | None:
    """Where the trainer of this directory listens; None while it does not."""
    with contextlib.suppress(FileNotFoundError):
        return int(read_json(directory.path / PORT_FILE)["port"])
    return None


def place_of(address: str | None, interfaces: Interfaces | None = None) -> tuple[str, str]:
    """The address at which this node is reached by others of its gang, and the interface that has it. Ends the program
    where torch would listen elsewhere: it is told of an interface, and takes that one's first address of IPv4."""
    if address is None:
        raise SystemExit("LORRY_GANG needs LORRY_ADVERTISE_ADDRESS: where the other nodes of the gang reach this one.")
    if not _is_ipv4(address):
        raise SystemExit(f"LORRY_ADVERTISE_ADDRESS is {address}, and has to be an address of IPv4, such as 10.0.0.11.")
    for name, addresses in (psutil.net_if_addrs() if interfaces is None else interfaces).items():
        own = [found.address for found in addresses if found.family == socket.AF_INET]
        if address in own and address != own[0]:
            raise SystemExit(
                f"LORRY_ADVERTISE_ADDRESS is {address}, and trainers would listen at {own[0]}, the first address of "
                f"{name}. Advertise that one, or give {address} to an interface of its own."
            )
        if address in own:
            return address, name
    raise SystemExit(f"LORRY_ADVERTISE_ADDRESS is {address}, and no network interface of this node has it.")


def _is_ipv4(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 4
    except ValueError:
        return False
