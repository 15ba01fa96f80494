"""The repositories of the Hugging Face Hub to which exports may be uploaded. Pure.

Workers upload with their own token, which may write to repositories of other projects. The operator therefore lists the
allowed repositories in LORRY_HUB_REPOSITORIES. The API server checks the list when an export is created, and the worker
checks its own list before it uploads.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from catalog.errors import Forbidden


def check(repository: str, allowed: Collection[str]) -> None:
    """Raises Forbidden if no pattern of `allowed`, such as `my-org/*`, matches the repository (ORG/NAME)."""
    if any(fnmatchcase(repository, pattern) for pattern in allowed):
        return
    reason = "does not contain it" if allowed else "is empty"
    organization = repository.partition("/")[0]
    raise Forbidden(
        f"Exports may not be uploaded to {repository!r} on the Hugging Face Hub, because LORRY_HUB_REPOSITORIES "
        f"{reason}.",
        code="hub_repository_not_allowed",
        remedy=f"Ask an operator to add {repository} or {organization}/* to LORRY_HUB_REPOSITORIES on the API servers "
        "and workers, and to restart them.",
        param="hub_repository",
    )
