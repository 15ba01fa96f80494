"""How the trainers of a gang's members find each other: what their settings say, and the port that the leader's tells.

Settings and port are written and read here, so that both ends agree; the trainer's own part is in apart.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import psutil

from worker.trainer_directory import Json, TrainerDirectory, read_json, write_json

PORT_FILE = "port.json"
RANKS_FILE = "LORRY_RANKS_FILE"
"""Variable that names the file by which the processes meet that were launched together on one machine."""


def meeting_settings(
    *, address: str, interface: str, port: int | None, name: str, first_rank: int, num_ranks: int
) -> Json:
    """Of trainer.json. port None: of the leader, whose trainer chooses one."""
    where = {"address": address, "interface": interface, "port": port}
    return where | {"name": name, "first_rank": first_rank, "num_ranks": num_ranks}


def ranks_file() -> Path | None:
    """Of this process; None where it was launched by itself, or by hand."""
    told = os.environ.get(RANKS_FILE)
    return Path(told) if told else None


def tell_port(directory: TrainerDirectory, port: int) -> None:
    """By the trainer, of itself."""
    write_json(directory.path / PORT_FILE, {"port": port})


def told_port(directory: TrainerDirectory) -> int | None:
    """Where the trainer of this directory listens; None while it does not."""
    with contextlib.suppress(FileNotFoundError):
        return int(read_json(directory.path / PORT_FILE)["port"])
    return None


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has the address; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.family in (socket.AF_INET, socket.AF_INET6) and found.address == address for found in addresses):
            return name
    return None
