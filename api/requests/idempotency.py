"""Recognizes a submission that a client sends again: by its idempotency key, else by its body."""

from __future__ import annotations

import hashlib
import json
from typing import TypedDict

from pydantic import BaseModel


class SubmissionIdentity(TypedDict):
    """Arguments of catalog.jobs.submission.create and catalog.sweeps.creation.create."""

    idempotency_key: str | None
    body_digest: str
    is_client_retry: bool


def identity_of(body: BaseModel, *, idempotency_key: str | None, is_client_retry: bool) -> SubmissionIdentity:
    """Return the identity of a submission. `body_digest` does not depend on the order or the whitespace of the JSON."""
    fields = json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True, separators=(",", ":"))
    return identity_of_text(fields, idempotency_key=idempotency_key, is_client_retry=is_client_retry)


def identity_of_text(text: str, *, idempotency_key: str | None, is_client_retry: bool) -> SubmissionIdentity:
    """Return the identity of a submission that this text describes."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"idempotency_key": idempotency_key, "body_digest": digest, "is_client_retry": is_client_retry}
