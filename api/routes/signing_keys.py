"""The public keys that verify the signatures of lineage records."""

from __future__ import annotations

from api.deps import Use
from api.routing import Router
from api.schemas.adapters import PublicKeySet
from catalog.audit import derived_keys

router = Router(tags=["adapters"])


@router.get("/v1/keys.json", operation_id="get_signing_keys")
def get_signing_keys(use: Use) -> PublicKeySet:
    """Return the public signing keys as a JSON Web Key Set. Requires no API key, so that every recipient of an adapter
    can verify its signature."""
    return PublicKeySet.model_validate(derived_keys.key_set(use.db, use.pepper.all()))
