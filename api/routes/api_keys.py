"""/v1/api_keys: create, list, rotate, limit and revoke API keys."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from api.auth.authentication import Signed
from api.deps import After, IdempotencyKey, Limit, Services, Use
from api.requests.parameters import ApiKeyId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.keys import (
    ApiKeyCreated,
    ApiKeyObject,
    ApiKeyRequest,
    ApiKeyRevoked,
    LimitsRequest,
    RevokeRequest,
    RotateRequest,
    created_object,
    key_object,
    revoked_object,
)
from api.schemas.pagination import ListPage, page_of
from catalog import revocation
from catalog.db.database import read_clock
from catalog.tenancy import api_keys

router = Router(prefix="/v1/api_keys", tags=["projects and keys"], responses={**SIGNED, **errors(403)})
ProjectName = Annotated[
    str | None,
    Query(
        description="Project ID or name (default: the key's own project). Others require an operator key.",
        max_length=64,
    ),
]


@router.post("", operation_id="create_api_key", responses=errors(404, 409))
def create_api_key(
    body: ApiKeyRequest, use: Use, caller: Signed, idempotency_key: IdempotencyKey = None
) -> ApiKeyCreated:
    """Create an API key. The response is the only one that contains the secret, which is not stored.

    A second request with the same Idempotency-Key is rejected with 409 `idempotency_key_reused`, which names the key
    that the first one created. A new key can't have more rights than the key that creates it. A project has at most 100
    valid keys. Requires the scope `keys:write`.
    """
    request = api_keys.KeyRequest(**body.model_dump())
    row, value = api_keys.create(
        use.db, caller=caller, request=request, pepper=use.pepper, idempotency_key=idempotency_key
    )
    return created_object(row, value, now=_now(use))


@router.get("", operation_id="list_api_keys", responses=errors(404))
def list_api_keys(
    use: Use, caller: Signed, after: After = None, limit: Limit = 20, project: ProjectName = None
) -> ListPage[ApiKeyObject]:
    """List the keys of a project, newest first, including revoked and expired ones. Secrets are never shown.

    Requires the scope `keys:read`.
    """
    page = api_keys.list_page(use.db, caller=caller, project=project, after=after, limit=limit)
    now = _now(use)
    return page_of([key_object(row, now=now) for row in page.items], has_more=page.has_more)


@router.get("/{api_key_id}", operation_id="get_api_key", responses=errors(404))
def get_api_key(api_key_id: ApiKeyId, use: Use, caller: Signed) -> ApiKeyObject:
    """Return an API key without its secret. Requires the scope `keys:read`."""
    return key_object(api_keys.get(use.db, caller=caller, api_key_id=api_key_id), now=_now(use))


@router.post("/{api_key_id}/revoke", operation_id="revoke_api_key", responses=errors(404, 409))
def revoke_api_key(api_key_id: ApiKeyId, use: Use, caller: Signed, body: RevokeRequest | None = None) -> ApiKeyRevoked:
    """Revoke a key immediately, together with the browser sessions created from it.

    The last operator key can't be revoked. Jobs that the key created continue unless they are cancelled; its sweeps
    create no more trials. Requires the scope `keys:write`.
    """
    asked = body or RevokeRequest()
    found = revocation.revoke(
        use.db,
        caller=caller,
        api_key_id=api_key_id,
        cancel=asked.cancel,
        with_descendants=asked.with_descendants,
    )
    return revoked_object(found, now=_now(use))


@router.post("/{api_key_id}/rotate", operation_id="rotate_api_key", responses=errors(404, 409))
def rotate_api_key(
    api_key_id: ApiKeyId,
    use: Use,
    caller: Signed,
    body: RotateRequest | None = None,
) -> ApiKeyCreated:
    """Create a key with the same name and rights. Both keys are valid for `overlap_seconds`; then the old one expires.

    A second rotation of the same key is rejected with 409 `key_already_rotated`, which names the new key. Not available
    in a browser session. Requires the scope `keys:write`.
    """
    asked = body or RotateRequest()
    row, value = api_keys.rotate(
        use.db,
        caller=caller,
        api_key_id=api_key_id,
        overlap_seconds=asked.overlap_seconds,
        expires_at=asked.expires_at,
        pepper=use.pepper,
    )
    return created_object(row, value, now=_now(use))


@router.post("/{api_key_id}/limits", operation_id="limit_api_key", responses=errors(404))
def limit_api_key(api_key_id: ApiKeyId, use: Use, caller: Signed, body: LimitsRequest) -> ApiKeyObject:
    """Set the rate limit of a key, the number of jobs it may create a day, and the highest priority of its jobs.

    Requires an operator key with the scope `keys:write`.
    """
    given = body.model_dump(exclude_unset=True)
    highest = given.pop("highest_priority", None)
    key = api_keys.limit(use.db, caller=caller, api_key_id=api_key_id, limits=given, highest_priority=highest)
    return key_object(key, now=_now(use))


def _now(use: Services) -> float:
    with use.db.read() as session:
        return read_clock(session)
