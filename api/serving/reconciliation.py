"""Compares the adapters that a serving endpoint lists with its deployments. Pure: returns what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from api.inference.vllm_client import ServedModel
from api.serving import adapter_files
from catalog.serving.keeping import EndpointWork, WantedAdapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Actions:
    """Requests that make a server match its deployments."""

    folder: Path
    """Folder of the endpoint's adapters."""
    unload: list[str]
    """Adapters that this service has loaded and that are not deployed with this content."""
    forget: list[str]
    """Deployments that are neither wanted nor loaded."""
    missing: list[str]
    """Deployments that are recorded as loaded, but are not."""
    load: list[tuple[WantedAdapter, ServedModel | None]]
    """Deployments to load and verify, with what the server has loaded under their names."""
    kept_files: set[str] | None
    """Names in the folder that are still needed. None if nothing has changed, and all files stay."""
    foreign: list[str]
    """Adapters that this service has not loaded and leaves alone."""


def diff(models: Sequence[ServedModel], work: EndpointWork) -> Actions:
    """Compare the models of a server with its deployments. models: empty if the server does not answer."""
    folder = endpoint_folder(work)
    loaded = {model.name: model for model in models if model.parent is not None}
    forget = [one for one in work.adapters if not one.is_wanted and one.name not in loaded]
    needed = {adapter_path(work, one).name for one in work.adapters if one not in forget and one.manifest is not None}
    needed |= {Path(model.root or "").name for model in loaded.values()}
    unload = [name for name, model in loaded.items() if _is_unwanted(work, model)]
    usable = {name: model for name, model in loaded.items() if name not in unload}
    missing = [one for one in work.adapters if one.state == "ready" and one.name not in usable]
    return Actions(
        folder=folder,
        unload=unload,
        forget=[one.deployment_id for one in forget],
        missing=[one.deployment_id for one in missing],
        load=[
            (one, usable.get(one.name))
            for one in work.adapters
            if one.is_wanted and (one in missing or (one.state != "ready" and one.is_due))
        ],
        kept_files=needed if forget or not work.adapters else None,
        foreign=sorted(name for name, model in loaded.items() if _is_foreign(work, model)),
    )


def endpoint_folder(work: EndpointWork) -> Path:
    row = work.endpoint
    return adapter_files.endpoint_folder(row.adapter_folder, service_id=work.service_id, endpoint_id=row.id)


def adapter_path(work: EndpointWork, one: WantedAdapter) -> Path:
    assert one.manifest is not None, "only adapters with files have a path"
    return adapter_files.adapter_path(endpoint_folder(work), adapter_id=one.adapter_id, manifest=one.manifest)


def _is_unwanted(work: EndpointWork, model: ServedModel) -> bool:
    """Return whether this service has loaded the adapter, for this endpoint or for one that does not exist any more,
    and it is not deployed with this content."""
    paths = {one.name: str(adapter_path(work, one)) for one in work.adapters if one.is_wanted}
    root = model.root or ""
    if root.startswith(f"{endpoint_folder(work)}/"):
        return paths.get(model.name) != root
    origin = adapter_files.origin_of(root)
    if origin is None or origin.service_id != work.service_id:
        return False
    return origin.endpoint_id == work.endpoint.id or origin.endpoint_id not in work.endpoint_ids


def _is_foreign(work: EndpointWork, model: ServedModel) -> bool:
    """Return whether this service has not loaded the adapter."""
    origin = adapter_files.origin_of(model.root or "")
    is_of_this_service = origin is not None and origin.service_id == work.service_id
    return not is_of_this_service and not (model.root or "").startswith(f"{endpoint_folder(work)}/")
