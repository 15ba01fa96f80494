"""Serving endpoints: inference servers that load adapters at run time."""

from __future__ import annotations

from collections.abc import Iterator

from lorry.models import Deployment, ServingEndpoint
from lorry.resources.resource import Resource

PATH = "serving/endpoints"


class Serving(Resource):
    """Serving endpoints. All methods accept an id or a name. Deployments are in `lorry.adapters`."""

    def add(
        self,
        name: str,
        *,
        base_model: str,
        url: str,
        adapter_folder: str,
        max_rank: int = 16,
        api_key: str | None = None,
    ) -> ServingEndpoint:
        """Register a running vLLM server. Requires an operator key.

        `adapter_folder`: a folder that the service and the server see at the same path. `max_rank`: vLLM's
        --max-lora-rank. `api_key`: the server's own key.
        """
        body = {"name": name, "base_model": base_model, "url": url, "adapter_folder": adapter_folder}
        body |= {"max_rank": max_rank, "api_key": api_key}
        return self._post(ServingEndpoint, PATH, body=body)

    def list(self) -> Iterator[ServingEndpoint]:
        return self._items(ServingEndpoint, PATH)

    def get(self, name: str) -> ServingEndpoint:
        return self._get(ServingEndpoint, PATH, name)

    def deployments(self, name: str) -> Iterator[Deployment]:
        """Yield the adapters of all projects on the endpoint. Requires an operator key."""
        return self._items(Deployment, PATH, name, "deployments")

    def report(self, name: str, *, error: str | None) -> ServingEndpoint:
        """Report that the server can't be started, so that its state is `failed`. Requires an operator key.

        `error`: the reason; None if the server is being started again.
        """
        return self._post(ServingEndpoint, PATH, name, "report", body={"error": error})

    def remove(self, name: str) -> None:
        """Remove an endpoint. The adapters there are unloaded. Requires an operator key."""
        self._delete(PATH, name)
