"""Who can read a data folder: it holds the operator's API key, the pepper, and the data of every project."""

from __future__ import annotations

import os
import stat
from pathlib import Path

OTHERS = 0o077
"""Permission bits of all users but the owner."""
CONTENTS = ("lorry.db", "pepper", "up.lock")
"""Any of these shows that a folder is a data folder of Lorry."""


def make_private(folder: Path) -> str | None:
    """Take the access of other users to a data folder away. Returns a sentence for the user; None if it was private.

    A folder that belongs to another user, is shared (sticky), or holds other things than Lorry's is only reported.
    """
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not mode & OTHERS:
        return None
    is_for_lorry = any((folder / name).exists() for name in CONTENTS) or not any(folder.iterdir())
    if is_for_lorry and status.st_uid == os.getuid() and not mode & stat.S_ISVTX:
        folder.chmod(mode & ~OTHERS)
        return f"Other users could access the data folder {folder} (mode {mode:o}). Now only you can."
    return (
        f"Other users can access the data folder {folder} (mode {mode:o}), which holds an operator's API key. Use "
        f"another folder with --data-dir, or run: chmod go-rwx {folder}"
    )
