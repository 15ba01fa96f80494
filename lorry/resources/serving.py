"""Serving endpoints: inference servers that load adapters at run time."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from lorry.models import Deployment, ServingEndpoint
from lorry.resources import pages
from lorry.transport.http import Transport

PATH = "serving/endpoints"


class Serving:
    """Serving endpoints. All methods accept an id or a name. Deployments are in `lorry.adapters`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

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
        return ServingEndpoint.of(self._transport.request("POST", PATH, body=body))

    def list(self) -> Iterator[ServingEndpoint]:
        return (ServingEndpoint.of(item) for item in pages.items(self._transport, PATH))

    def get(self, name: str) -> ServingEndpoint:
        return ServingEndpoint.of(self._transport.get(_of(name)))

    def deployments(self, name: str) -> Iterator[Deployment]:
        """Yield the adapters of all projects on the endpoint. Requires an operator key."""
        return (Deployment.of(item) for item in pages.items(self._transport, f"{_of(name)}/deployments"))

    def report(self, name: str, *, error: str | None) -> ServingEndpoint:
        """Report that the server can't be started, so that its state is `failed`. Requires an operator key.

        `error`: the reason; None if the server is being started again.
        """
        return ServingEndpoint.of(self._transport.request("POST", f"{_of(name)}/report", body={"error": error}))

    def remove(self, name: str) -> None:
        """Remove an endpoint. The adapters there are unloaded. Requires an operator key."""
        self._transport.request("DELETE", _of(name))


def _of(name: str) -> str:
    return f"{PATH}/{quote(name, safe='')}"
