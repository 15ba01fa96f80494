"""Access rights of a data folder, which contains the operator's API key, the pepper, and the data of all projects."""

from __future__ import annotations

import os
import stat
from pathlib import Path

OTHERS = 0o077
"""Permission bits of all users except the owner."""
CONTENTS = ("lorry.db", "pepper", "up.lock")
"""Files that identify a data folder of Lorry."""


def make_private(folder: Path) -> str | None:
    """Revoke other users' access to a data folder. Return a message for the user; None if the folder was private.

    A folder that belongs to another user, is shared (sticky bit), or contains other files is only reported.
    """
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not mode & OTHERS:
        return None
    is_for_lorry = any((folder / name).exists() for name in CONTENTS) or not any(folder.iterdir())
    if is_for_lorry and status.st_uid == os.getuid() and not mode & stat.S_ISVTX:
        folder.chmod(mode & ~OTHERS)
        return f"Other users could access the data folder {folder} (mode {mode:o}). Access is now restricted to you."
    return (
        f"Other users can access the data folder {folder} (mode {mode:o}), which contains an operator's API key. Use "
        f"another folder with --data-dir, or run: chmod go-rwx {folder}"
    )
