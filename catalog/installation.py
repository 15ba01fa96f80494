"""How to install optional parts of the server. No package index has the distributions `lorry` and `lorry-server`."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """Return the command that installs an optional part, such as `quant`, and where to run it."""
    return f"`pip install ./client '.[{extra}]'` in Lorry's source folder"
