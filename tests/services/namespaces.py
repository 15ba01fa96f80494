"""Nodes on one machine: network namespaces, each connected to a bridge of the machine.

Needs root and `ip`. Files, processes and clocks are shared. A process in a node reaches others by their addresses only,
and receives nothing while its link is down.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    name: str
    address: str
    link: str
    """The end of its virtual cable at the bridge."""

    def argv(self, argv: list[str]) -> list[str]:
        """Return the command that runs `argv` in this node and in the same process."""
        return ["ip", "netns", "exec", self.name, *argv]

    def cut_off(self) -> None:
        _ip("link", "set", self.link, "down")

    def connect(self) -> None:
        _ip("link", "set", self.link, "up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    address: str
    """The address at which nodes reach this machine."""
    nodes: list[Node]


def hindrance() -> str | None:
    """Return the reason why namespaces are not available, or None."""
    if shutil.which("ip") is None:
        return "needs the program ip"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"lorry-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if tried.returncode != 0:
        return f"network namespaces are not permitted here: {tried.stderr.decode().strip()}"
    _ip("netns", "del", name)
    return None


@contextmanager
def network(num_nodes: int) -> Iterator[Network]:
    """Create a bridge and `num_nodes` nodes, and remove them after the block."""
    key = secrets.token_hex(3)
    subnet = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
    bridge = f"lb{key}"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        nodes = [_node(stack, bridge, key, number, f"{subnet}.{number + 2}") for number in range(num_nodes)]
        yield Network(address=f"{subnet}.1", nodes=nodes)


def _node(stack: ExitStack, bridge: str, key: str, number: int, address: str) -> Node:
    name, link, inner = f"lorry-{key}-{number}", f"lv{key}{number}", f"ln{key}{number}"
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("link", "add", link, "type", "veth", "peer", "name", inner)
    stack.callback(subprocess.run, ["ip", "link", "del", link], capture_output=True, check=False)
    _ip("link", "set", inner, "netns", name)
    _ip("link", "set", link, "master", bridge, "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
    _ip("-n", name, "link", "set", inner, "up")
    _ip("-n", name, "link", "set", "lo", "up")
    return Node(name=name, address=address, link=link)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
