"""A real service with a serving endpoint, and the requests of an operator and of two projects."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from api.deps import Services
from catalog.tables.storage import Adapter
from catalog.tables.tenancy import Organization
from tests.api.serving_engines import FakeVllm
from tests.api.site import Site, until

Json = dict[str, Any]
QUESTION: Json = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 4}


@dataclass(kw_only=True)
class ServingSite:
    site: Site
    services: Services
    vllm: FakeVllm
    adapter: Adapter
    folder: Path
    operator_key: str
    stranger_key: str
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> ServingSite:
        self.client = self._client(self.site.key)
        self.operator = self._client(self.operator_key)
        self.stranger = self._client(self.stranger_key)
        return self

    def __exit__(self, *_raised: object) -> None:
        self._open.close()

    def _client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return self._open.enter_context(
            httpx.Client(base_url=self.site.url, headers=headers, trust_env=False, timeout=60)
        )

    def register(self, name: str = "vllm-1", **changes: Any) -> Json:
        body = {"name": name, "base_model": self.adapter.base_model, "url": self.vllm.url}
        response = self.operator.post(
            "/v1/serving/endpoints", json={**body, "adapter_folder": str(self.folder), **changes}
        )
        assert response.status_code == 200, response.text
        return response.json()

    def report(self, error: str | None, name: str = "vllm-1") -> None:
        response = self.operator.post(f"/v1/serving/endpoints/{name}/report", json={"error": error})
        assert response.status_code == 200, response.text

    def endpoint(self, name: str = "vllm-1") -> Json:
        return self.operator.get(f"/v1/serving/endpoints/{name}").json()

    def deploy(self, endpoint: str = "vllm-1") -> httpx.Response:
        return self.client.post(f"/v1/adapters/{self.adapter.id}/deployments", json={"endpoint": endpoint})

    def deployments(self) -> list[Json]:
        return self.client.get(f"/v1/adapters/{self.adapter.id}/deployments").json()["data"]

    def wait_for(self, state: str, *, endpoint_state: str = "ready") -> Json:
        """Wait until the only deployment has this state. Returns it."""
        until(lambda: [one["state"] for one in self.deployments()] == [state])
        until(lambda: self.endpoint()["state"] == endpoint_state)
        return self.deployments()[0]

    def deployed(self) -> Json:
        """Register the endpoint and deploy the adapter there. Returns the deployment, which is ready."""
        self.register()
        assert self.deploy().status_code == 200
        return self.wait_for("ready")

    def ask(self, model: str | None = None, *, path: str = "/v1/chat/completions", **changes: Any) -> httpx.Response:
        body = {"model": model or self.adapter.name, **QUESTION, **changes}
        return self.client.post(path, json=body)

    def service_id(self) -> str:
        with self.services.db.read() as session:
            return session.query(Organization).one().id.removeprefix("org-")

    def endpoint_folder(self, endpoint_id: str, *, service_id: str | None = None) -> Path:
        """Return the folder of an endpoint of this or another service in the adapter folder."""
        return self.folder / f"lorry-{service_id or self.service_id()}-{endpoint_id}"

    def folders(self) -> list[Path]:
        """Return the folders of adapters that the inference server can see."""
        return sorted(path.parent for path in self.folder.glob("*/*/adapter_config.json"))
