"""Chooses the serving endpoint that answers a request: one that is ready and has verified the adapter."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import Conflict
from catalog.pepper import Pepper
from catalog.serving import endpoints, probes
from catalog.serving.probes import GenerationSettings, ProbeKind
from catalog.tables.serving import Deployment, ServingEndpoint
from catalog.tables.storage import Adapter

USABLE = (ServingEndpoint.state == "ready", ServingEndpoint.deleted_at.is_(None))


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingRoute:
    """An endpoint and the server's name of the model. deployment_id: None: the base model answers.

    settings: for the kind of the request.
    """

    endpoint_id: str
    endpoint_name: str
    deployment_id: str | None
    url: str
    api_key: str | None
    served_model: str
    settings: GenerationSettings


def route_of(db: Database, *, model: str, base_digest: str, kind: ProbeKind, pepper: Pepper) -> ServingRoute | None:
    """Return the endpoint for a model that the caller may use, or None. Several endpoints share the requests.

    kind: of the request. If the base model has no chat template, no endpoint answers a chat.
    """
    usable = (*USABLE, ServingEndpoint.base_digest == base_digest)
    with db.read() as session:
        found: list[tuple[ServingEndpoint, str | None]] = []
        if model.startswith("ft:"):
            loaded = (
                select(ServingEndpoint, Deployment.id)
                .join(Deployment, Deployment.endpoint_id == ServingEndpoint.id)
                .join(Adapter, Adapter.id == Deployment.adapter_id)
                .where(*usable, Adapter.name == model, Deployment.state == "ready")
            )
            found = [(row, deployment_id) for row, deployment_id in session.execute(loaded)]
        else:
            found = [(row, None) for row in session.scalars(select(ServingEndpoint).where(*usable))]
        known = [(row, one, settings) for row, one in found if (settings := probes.settings_of(row.reference, kind))]
        if not known:
            return None
        row, deployment_id, settings = random.choice(known)  # noqa: S311  (no secret)
    try:
        api_key = endpoints.api_key(row, peppers=pepper.all())
    except Conflict:  # the endpoint's keeper reports it
        return None
    return ServingRoute(
        endpoint_id=row.id,
        endpoint_name=row.name,
        deployment_id=deployment_id,
        url=row.url,
        api_key=api_key,
        served_model=model if deployment_id is not None else row.served_model or model,
        settings=settings,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModels:
    """The models that serving endpoints can answer with now."""

    base_digests: frozenset[str]
    adapters: frozenset[tuple[str, str]]
    """Name and digest of the base model of each adapter."""

    def has(self, name: str, base_digest: str) -> bool:
        return (name, base_digest) in self.adapters if name.startswith("ft:") else base_digest in self.base_digests


def served(session: Session, names: Collection[str]) -> ServedModels:
    """Return the models for which `route_of` finds an endpoint: all base models, and adapters with one of the names."""
    deployed = (
        select(Adapter.name, ServingEndpoint.base_digest)
        .join(Deployment, Deployment.adapter_id == Adapter.id)
        .join(ServingEndpoint, ServingEndpoint.id == Deployment.endpoint_id)
        .where(*USABLE, Deployment.state == "ready", Adapter.name.in_(names))
    )
    bases = session.scalars(select(ServingEndpoint.base_digest).where(*USABLE))
    return ServedModels(
        base_digests=frozenset(bases), adapters=frozenset((name, digest) for name, digest in session.execute(deployed))
    )


def note_lost(db: Database, route: ServingRoute, *, error: str, concerns_adapter: bool) -> None:
    """Record that the endpoint does not answer or, if `concerns_adapter`, that it does not know the adapter. No such
    request is sent there until the endpoint has been checked again."""
    with db.write() as session:
        now = read_clock(session)
        if concerns_adapter:
            shown = "The server has lost the adapter, which is being loaded again."
            lost = {"state": "pending", "last_error": shown, "operator_error": error}
            lost |= {"next_try_at": now, "updated_at": now}
            one = (Deployment.id == route.deployment_id, Deployment.state == "ready")
            session.execute(update(Deployment).where(*one).values(lost))
            return
        gone = {"state": "unreachable", "last_error": error, "checked_at": now}
        own = (ServingEndpoint.id == route.endpoint_id, ServingEndpoint.state == "ready")
        session.execute(update(ServingEndpoint).where(*own).values(gone))
