"""/v1/batches: files of completion requests that are answered at low priority, in OpenAI's format."""

from __future__ import annotations

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.inference.batch_schemas import BatchObject, BatchRequest, batch_object
from api.requests.parameters import BatchId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from catalog.batches import commands

router = Router(prefix="/v1/batches", tags=["inference"], responses=SIGNED)


@router.post("", operation_id="create_batch", responses=errors(404))
def create_batch(body: BatchRequest, use: Use, caller: Signed, is_retry: IsRetry) -> BatchObject:
    """Create a batch from a file of requests.

    All lines are validated first: if one is invalid, the batch fails, and `errors` lists the lines. Otherwise each
    request is answered as soon as no request with a waiting client needs the worker. Requires the scope
    `models:answer`.
    """
    batch = commands.create(
        use.db,
        caller=caller,
        input_file=body.input_file_id,
        endpoint=body.endpoint,
        labels=body.metadata,
        lifetime_seconds=None if body.output_expires_after is None else body.output_expires_after.seconds,
        is_client_retry=is_retry,
    )
    use.batches.wake()
    return batch_object(batch)


@router.get("", operation_id="list_batches")
def list_batches(use: Use, caller: Signed, after: After = None, limit: Limit = 20) -> ListPage[BatchObject]:
    """List the project's batches, newest first. Requires the scope `models:answer`."""
    page = commands.list_page(use.db, project_id=caller.project_id, after=after, limit=limit)
    return page_of([batch_object(row) for row in page.items], has_more=page.has_more)


@router.get("/{batch_id}", operation_id="get_batch", responses=errors(404))
def get_batch(batch_id: BatchId, use: Use, caller: Signed) -> BatchObject:
    """Return a batch. Requires the scope `models:answer`."""
    return batch_object(commands.get(use.db, project_id=caller.project_id, batch_id=batch_id))


@router.post("/{batch_id}/cancel", operation_id="cancel_batch", responses=errors(404, 409))
def cancel_batch(batch_id: BatchId, use: Use, caller: Signed) -> BatchObject:
    """Cancel a batch. Responses that are complete are kept in the output file. Requires the scope `models:answer`."""
    batch = commands.cancel(use.db, project_id=caller.project_id, batch_id=batch_id)
    use.batches.wake()
    return batch_object(batch)
