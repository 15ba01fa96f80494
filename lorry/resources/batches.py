"""Batches: files of inference requests that are answered at low priority."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from lorry.models import Batch
from lorry.resources import pages
from lorry.transport.http import Transport

_PATH = "batches"


class Batches:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, *, input_file: str, endpoint: str, metadata: Mapping[str, str] | None = None) -> Batch:
        """Create a batch from a file with the purpose `batch`. endpoint: `/v1/chat/completions` or `/v1/completions`.

        Its lines are checked later: if one is invalid, the batch fails.
        """
        body = {"input_file_id": input_file, "endpoint": endpoint, "completion_window": "24h"}
        given = {} if metadata is None else {"metadata": dict(metadata)}
        return Batch.of(self._transport.request("POST", _PATH, body={**body, **given}))

    def get(self, batch_id: str) -> Batch:
        return Batch.of(self._transport.get(_of(batch_id)))

    def list(self, *, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches, newest first."""
        return (Batch.of(item) for item in itertools.islice(pages.follow(self._transport, _PATH), limit))

    def cancel(self, batch_id: str) -> Batch:
        """Cancel the batch. Responses that are complete are kept in its output file."""
        return Batch.of(self._transport.request("POST", f"{_of(batch_id)}/cancel"))


def _of(batch_id: str) -> str:
    return f"{_PATH}/{quote(batch_id, safe='')}"
