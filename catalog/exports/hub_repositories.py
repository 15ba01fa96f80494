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
    organization = repository.partition("/")[0]
    raise Forbidden(
        "hub_repository_not_allowed" if allowed else "no_hub_repository_allowed",
        repository=repository,
        organization=organization,
        param="hub_repository",
    )
