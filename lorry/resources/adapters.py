"""Trained adapters: list, download, verify, share and trace them."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorry.errors import LorryError
from lorry.models import Adapter, AdapterExport, Deployment, Job, Permission
from lorry.resources.exports import AdapterExports, Format, Quantization
from lorry.resources.files import OnBytes
from lorry.resources.resource import Resource, new_key, url
from lorry.transport.http import Transport
from lorry.verification import adapter_archive, adapter_folder

_PATH = "adapters"


class Adapters(Resource):
    """Adapters and checkpoints, own and shared ones. All methods accept an id or a name."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.exports = AdapterExports(transport)

    def list(self, *, limit: int | None = None, shared: bool = False) -> Iterator[Adapter]:
        """Yield adapters, newest first. `shared`: those that other projects share, instead of the project's own."""
        return self._list(Adapter, _PATH, limit=limit, params={"shared": "true" if shared else None})

    def get(self, name: str) -> Adapter:
        return self._get(Adapter, _PATH, name)

    def manifest(self, name: str) -> dict[str, Any]:
        """Return the manifest. `data`: path, digest and num_bytes of each file; `artifact`: digest of the manifest."""
        return self._transport.get(url(_PATH, name, "files"))

    def lineage(self, name: str) -> dict[str, Any]:
        """Return the lineage record with its id. `children`: names of the adapters that continue from this one."""
        return self._transport.get(url(_PATH, name, "lineage"))

    def verify(self, name: str) -> dict[str, Any]:
        """Make the service verify every stored byte. Return `passed` and `problems`."""
        return self._transport.request("POST", url(_PATH, name, "verify"))

    def reproduce(self, name: str, *, idempotency_key: str | None = None) -> Job:
        """Create a job that trains the adapter again from its lineage record. Wait for it with `lorry.jobs.wait`.

        `reproduces` of the finished job contains the comparison: `identical` and `message`. Raises Conflict with a list
        of the inputs that are missing. Retries after a lost response create no second job.
        """
        return self._post(Job, _PATH, name, "reproduce", key=idempotency_key or new_key())

    def signing_keys(self) -> builtins.list[dict[str, Any]]:
        """Return the public keys of lineage signatures, for `lorry.verification.adapter_folder.verify_folder`."""
        return self._transport.get("keys.json")["keys"]

    def export(
        self,
        name: str,
        format: Format,  # noqa: A002
        *,
        quantization: Quantization | None = None,
        hub_repository: str | None = None,
    ) -> AdapterExport:
        """Make a worker export the adapter in the format of a serving engine; see `exports.create`.

        Wait for it with `exports.wait`, then download it with `exports.pull`.
        """
        return self.exports.create(name, format, quantization=quantization, hub_repository=hub_repository)

    def delete(self, name: str) -> None:
        """Delete an adapter with its files and exports."""
        self._delete(_PATH, name)

    def share(self, name: str, projects: Sequence[str]) -> builtins.list[Permission]:
        """Allow other projects, by id or name, to read, download and continue it. Requires an operator key."""
        answer = self._transport.request("POST", url(*_permissions(name)), body={"project_ids": [*projects]})
        return [Permission.of(item) for item in answer["data"]]

    def permissions(self, name: str) -> Iterator[Permission]:
        """Yield the permissions of other projects, newest first. Requires an operator key."""
        return self._list(Permission, *_permissions(name))

    def unshare(self, name: str, permission_id: str) -> None:
        """Revoke a permission. Running jobs of the other project continue. Requires an operator key."""
        self._delete(*_permissions(name, permission_id))

    def deploy(self, name: str, endpoint: str) -> Deployment:
        """Deploy an adapter on a serving endpoint, by its name or id. Returns immediately, in state `pending`."""
        return self._post(Deployment, _PATH, name, "deployments", body={"endpoint": endpoint})

    def deployments(self, name: str) -> Iterator[Deployment]:
        """Yield the deployments of an adapter, by the endpoint's name."""
        return self._items(Deployment, _PATH, name, "deployments")

    def wait_deployed(
        self,
        name: str,
        endpoint_id: str,
        *,
        on_progress: Callable[[Deployment], None] | None = None,
        poll_seconds: float = 0.5,
    ) -> Deployment:
        """Wait until a deployment is `ready` or `failed`. Raises LorryError if it was removed meanwhile.

        It stays `pending` while the endpoint or a worker is not available: `last_error` has the reason.
        """
        while True:
            found = next((one for one in self.deployments(name) if one.endpoint_id == endpoint_id), None)
            if found is None or found.state == "removing":
                raise LorryError("deployment_removed", name=name)
            if on_progress is not None:
                on_progress(found)
            if found.state in ("ready", "failed"):
                return found
            self._transport.sleep(poll_seconds)

    def undeploy(self, name: str, endpoint: str) -> None:
        """Unload an adapter from a serving endpoint, by its name or id."""
        self._delete(_PATH, name, "deployments", endpoint)

    def pull(self, name: str, directory: Path | str, *, on_progress: OnBytes | None = None) -> Path:
        """Download the adapter to `directory`, which must not exist, be empty, or contain this adapter. If it contains
        this adapter, only the lineage record is updated, which may have been signed since.

        Every digest is checked before the folder appears under its name. It contains the files that PEFT needs, and
        manifest.json and lineage.json for `lorry.verification.adapter_folder.verify_folder`. Raises BadDownload.
        """
        adapter = self.get(name)
        lineage = {key: value for key, value in self.lineage(adapter.id).items() if key != "children"}
        contents = adapter_folder.Contents.of(
            name=adapter.name or adapter.id,
            manifest=self.manifest(adapter.id),
            artifact=adapter.artifact,
            lineage=lineage,
        )
        target = Path(directory).expanduser()
        if adapter_folder.holds(target, contents):
            contents.update_lineage(target)
            return target
        adapter_folder.check_free(target, name=contents.name)
        archive = url(_PATH, adapter.id, "archive")
        with self._transport.stream(archive, headers={"accept": "application/x-tar"}) as response:
            return adapter_archive.unpack(response.iter_bytes(), contents, target, on_progress=on_progress)


def _permissions(name: str, *rest: str) -> tuple[str, ...]:
    return ("fine_tuning/checkpoints", name, "permissions", *rest)
