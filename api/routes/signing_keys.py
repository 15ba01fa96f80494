"""The public keys that lineage records are signed with."""

from __future__ import annotations

from api.deps import Use
from api.routing import Router
from api.schemas.adapters import PublicKeySet
from catalog.audit import derived_keys

router = Router(tags=["adapters"])


@router.get("/v1/keys.json", operation_id="get_signing_keys")
def get_signing_keys(use: Use) -> PublicKeySet:
    """Public keys as a JSON Web Key Set. Needs no API key: every receiver of an adapter can check its signature."""
    return PublicKeySet.model_validate(derived_keys.key_set(use.db, use.pepper.all()))
