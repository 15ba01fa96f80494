"""Dependencies of routes: the services of this process, request headers and pagination parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Header, Query, Request

from api.rate_limits.threads import KeyChecks, SlowWork
from api.settings import ApiSettings
from api.telemetry import Telemetry
from api.transfers.attachment import Downloads
from catalog.audit.downloads import ReadAudit
from catalog.db.database import Database
from catalog.pepper import Pepper
from catalog.queue.notifier import Notifier
from catalog.settings import Settings
from catalog.storage.store import ArtifactStore

if TYPE_CHECKING:
    from api.inference.batch_loop import BatchRunner
    from api.inference.exchange import Engines
    from api.rate_limits.limits import Limits
    from api.serving.keeper import EndpointKeepers
    from api.streaming.hub import Feed
    from api.streaming.sources import JobSource, QueueSource
    from api.webhooks.delivery_loop import WebhookDeliverer
    from api.webhooks.http_sender import WebhookSender


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """Services that outlive a request. `create_app` creates them once."""

    settings: Settings
    api_settings: ApiSettings
    db: Database
    store: ArtifactStore
    downloads: Downloads
    read_audit: ReadAudit
    notifier: Notifier
    key_checks: KeyChecks
    slow_work: SlowWork
    pepper: Pepper
    feed: Feed
    job_source: JobSource
    queue_source: QueueSource
    limits: Limits
    telemetry: Telemetry
    webhooks: WebhookSender
    deliverer: WebhookDeliverer
    batches: BatchRunner
    engines: Engines
    keepers: EndpointKeepers


async def services_of(request: Request) -> Services:
    return request.app.state.services


RetryCount = Annotated[int, Header(ge=0, include_in_schema=False)]


async def is_client_retry(x_stainless_retry_count: RetryCount = 0) -> bool:
    """Return whether the client reports that this request is a retry of one that got no response."""
    return x_stainless_retry_count > 0


IdempotencyKey = Annotated[
    str | None,
    Header(
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Identifies the submission. A repeated request with the same key creates nothing new.",
    ),
]
Use = Annotated[Services, Depends(services_of)]
IsRetry = Annotated[bool, Depends(is_client_retry)]
After = Annotated[
    str | None, Query(description="Return items after the item with this ID. Omitted: the first page.", max_length=128)
]
JobKey = Annotated[
    str | None,
    Header(
        alias="idempotency-key",
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Identifies the submission. A repeated request with the same key returns the same job.",
    ),
]
Limit = Annotated[int, Query(description="Maximum number of items to return, 1 to 100.", ge=1, le=100)]
