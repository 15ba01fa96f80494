"""Inference requests that wait for an answer."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Leased, Table

MAX_CLAIMS = 3
"""Workers that may fail to answer a request before it fails: it may be the cause."""
MAX_SECONDS = 600.0
"""How long a request may wait for a worker. OpenAI's clients wait as long for a response."""


class InferenceRequest(Leased, Table):
    """A request for completions. It is leased to the worker that answers it. The generated tokens are not stored: the
    worker sends them to the API process that holds the client's connection, and that process deletes the row. For a
    batch, the API process that works on it takes the place of the client."""

    __tablename__ = "inference_requests"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    expires_at: Mapped[float]
    """After this time no worker begins to answer it, and cleaning deletes it."""
    base_model: Mapped[str] = mapped_column(ForeignKey("base_models.name"))
    base_digest: Mapped[str]
    pack_key: Mapped[str]
    """The trainers that can answer it."""
    adapter: Mapped[str | None]
    """Digest of the adapter's manifest. None: the base model answers."""
    body: Mapped[Json] = mapped_column(deferred=True)
    """The parameters, with all defaults. Only a claim reads them: see `claims.InferenceClaim.body`."""
    reply_to: Mapped[str]
    """TOKEN@HOST:PORT, where the API process receives the answer."""
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"))
    """The batch that it belongs to. Requests of batches have a lower priority. None: a client waits for the answer."""
    num_claims: Mapped[int] = mapped_column(default=0)
    """Workers that have begun to answer it."""
    __table_args__ = (
        Index(None, "pack_key", "created_at"),
        Index(None, "project_id", "created_at"),
        Index(None, "batch_id"),
        Index(None, "expires_at"),
    )
