"""Explains how to install optional parts of the server. No package index has `lorry` and `lorry-server` yet."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """Return the command that installs an optional part, such as `quant`, and where to run it."""
    return f"`pip install ./client '.[{extra}]'` in Lorry's source folder"
