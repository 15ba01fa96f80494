"""Batches: files of inference requests that are answered at low priority."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorry.models import Batch
from lorry.resources.resource import Resource, given

_PATH = "batches"


class Batches(Resource):
    def create(self, *, input_file: str, endpoint: str, metadata: Mapping[str, str] | None = None) -> Batch:
        """Create a batch from a file with the purpose `batch`. endpoint: `/v1/chat/completions` or `/v1/completions`.

        Its lines are checked later: if one is invalid, the batch fails.
        """
        body = given(input_file_id=input_file, endpoint=endpoint, completion_window="24h", metadata=metadata)
        return self._post(Batch, _PATH, body=body)

    def get(self, batch_id: str) -> Batch:
        return self._get(Batch, _PATH, batch_id)

    def list(self, *, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches, newest first."""
        return self._list(Batch, _PATH, limit=limit)

    def cancel(self, batch_id: str) -> Batch:
        """Cancel the batch. Responses that are complete are kept in its output file."""
        return self._post(Batch, _PATH, batch_id, "cancel")
