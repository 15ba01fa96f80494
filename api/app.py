"""Assembles the app: services, middleware, routes, the OpenAPI document and background tasks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI

from api.background.periodic import LOOPS, PERIODIC, background_work
from api.dashboard import Dashboard
from api.deps import Services
from api.errors import handlers
from api.inference import batch_routes
from api.inference.batch_loop import BatchRunner
from api.inference.exchange import Engines
from api.inference.vllm_client import VllmClient
from api.middleware.http import HostPolicy, host_policy
from api.middleware.request_gate import Gate
from api.openapi import Api
from api.rate_limits.limits import Limits
from api.rate_limits.threads import ROUTE_THREADS, KeyChecks, SlowWork
from api.requests.parameters import refuse_unknown_query
from api.requests.strict_json import refuse_loose_json
from api.routes import (
    adapters,
    api_keys,
    audit_events,
    files,
    fleet,
    health,
    inference,
    job_history,
    jobs,
    models,
    organizations,
    permissions,
    plans,
    projects,
    sign_in,
    signing_keys,
    sweeps,
    usage,
    webhooks,
)
from api.routes import uploads as part_uploads
from api.routes.serving import endpoints as serving_endpoints
from api.routes.serving import exports
from api.serving.keeper import EndpointKeepers, KeeperTools
from api.serving.reference_answers import ReferenceAnswers
from api.settings import ApiSettings
from api.streaming.hub import Feed
from api.streaming.sources import JobSource, QueueSource
from api.telemetry import Telemetry
from api.transfers import file_upload
from api.transfers.attachment import Downloads
from api.webhooks.delivery_loop import WebhookDeliverer
from api.webhooks.http_sender import WebhookSender
from catalog.audit import derived_keys
from catalog.audit.downloads import ReadAudit
from catalog.db.database import Database
from catalog.fleet.compatibility import lorry_version
from catalog.pepper import load as load_pepper
from catalog.queue.notifier import open_notifier
from catalog.scheduling.snapshot import Policy
from catalog.settings import Settings
from catalog.storage.store import open_store

DESCRIPTION = """Self-hosted LoRA fine-tuning service: trains many adapters at once on one loaded base model.

The API is compatible with the OpenAI fine-tuning API. The unchanged `openai` client works for files, fine-tuning jobs
and models: set `base_url` to this service's `/v1` and `api_key` to an API key of this service. Lorry adds fields and
resources to that API.

An API key may call the operations that its scopes permit. `x-scopes` lists the scopes of an operation; one of them
is sufficient.

Every error response is `{"error": {"message", "type", "param", "code", "remedy"}}`. The message ends with the remedy.
"""
TAGS = [
    {
        "name": "files",
        "description": "Training data (validated line by line), result files and other files; uploads in parts.",
    },
    {"name": "fine-tuning jobs", "description": "Jobs that train one adapter from files and a base model."},
    {"name": "sweeps", "description": "Groups of jobs that differ in chosen fields, ranked by an objective."},
    {"name": "plans", "description": "Dry runs: data, memory, time and warnings of a job before it is submitted."},
    {"name": "models", "description": "Base models, adapters and checkpoints by name."},
    {"name": "inference", "description": "Answers of base models, adapters and checkpoints."},
    {"name": "adapters", "description": "Trained adapters, their files, exports and lineage."},
    {"name": "serving", "description": "Inference servers that load adapters at run time, and deployments on them."},
    {"name": "permissions", "description": "Adapters and checkpoints that other projects may read."},
    {"name": "queue and workers", "description": "Queued and running jobs, and the workers that train them."},
    {"name": "projects and keys", "description": "Organizations, projects, quotas, API keys and scopes."},
    {"name": "usage", "description": "Daily usage of a project."},
    {"name": "audit log", "description": "Changes and their actors, sealed into a hash chain."},
    {"name": "webhooks", "description": "Endpoints that are notified when a job has finished, and their deliveries."},
    {"name": "sign-in", "description": "Browser sessions of the dashboard."},
    {"name": "health", "description": "Liveness, readiness and metrics."},
]


def create_app(
    settings: Settings,
    api_settings: ApiSettings | None = None,
    *,
    bound_host: str = "127.0.0.1",
    further_hosts: Iterable[str] = (),
) -> FastAPI:
    """Create the app over a migrated database. `bound_host` is the address that the server will listen on."""
    own = api_settings or ApiSettings()
    services = open_services(settings, own)
    app = Api(
        title="Lorry",
        version=lorry_version(),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        dependencies=[Depends(refuse_unknown_query), Depends(refuse_loose_json)],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.services = services
    app.add_middleware(
        Gate,
        hosts=_hosts(own, bound_host, further_hosts),
        max_body_bytes=own.max_body_bytes,
        telemetry=services.telemetry,
        trusted_proxies=own.proxy_networks(),
    )
    handlers.install(app)
    resources = (
        files,
        part_uploads,
        plans,
        jobs,
        job_history,
        sweeps,
        models,
        adapters,
        exports,
        permissions,
        inference,
        batch_routes,
        fleet,
        organizations,
        projects,
        api_keys,
        usage,
        audit_events,
        webhooks,
        serving_endpoints,
    )
    for module in (*resources, signing_keys, sign_in, health):
        app.include_router(module.router)
    app.mount("/dashboard", Dashboard())
    return app


def open_services(settings: Settings, api_settings: ApiSettings) -> Services:
    feed = Feed(
        stream_poll_seconds=api_settings.stream_poll_seconds, heartbeat_seconds=api_settings.stream_heartbeat_seconds
    )
    telemetry = Telemetry([each.name for each in PERIODIC], LOOPS)
    telemetry.count_streams(feed.num_listeners)
    db = Database(settings.resolved_database_url())
    pepper = load_pepper(settings, db)
    derived_keys.retire(db, pepper)
    telemetry.count_long_writes(lambda: db.num_long_writes)
    sender = WebhookSender(api_settings.webhook_rules())
    store, notifier = open_store(settings), open_notifier(settings)
    engines = Engines(db, pepper=pepper, notifier=notifier, client=VllmClient())
    references = ReferenceAnswers(db, engines)
    # with its own client: requests of clients must not delay the checks
    keepers = EndpointKeepers(
        KeeperTools(db=db, store=store, client=VllmClient(), references=references, pepper=pepper)
    )
    engines.on_endpoint_lost = keepers.wake
    return Services(
        settings=settings,
        api_settings=api_settings,
        db=db,
        store=store,
        read_audit=ReadAudit(db),
        downloads=Downloads(),
        notifier=notifier,
        key_checks=KeyChecks(),
        slow_work=SlowWork(),
        pepper=pepper,
        feed=feed,
        job_source=JobSource(db),
        queue_source=QueueSource(db, Policy.of(settings)),
        limits=Limits(api_settings),
        telemetry=telemetry,
        webhooks=sender,
        deliverer=WebhookDeliverer(db, sender, pepper=pepper, telemetry=telemetry),
        batches=BatchRunner(db, store, settings, engines),
        engines=engines,
        keepers=keepers,
    )


def _hosts(api_settings: ApiSettings, bound_host: str, further: Iterable[str]) -> HostPolicy:
    return host_policy(bound_host=bound_host, named=[*api_settings.named_hosts(), *further])


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    services: Services = app.state.services
    current_default_thread_limiter().total_tokens = ROUTE_THREADS
    file_upload.remove_stale(services.settings.data_dir / "spool")
    try:
        async with background_work(services):
            try:
                yield
            finally:
                services.feed.close()
                services.slow_work.close()
    finally:
        await services.engines.close()
        services.notifier.close()
        services.db.close()
