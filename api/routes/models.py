"""/v1/models: base models, adapters and checkpoints by name."""

from __future__ import annotations

from api.auth.authentication import Operator, Signed
from api.auth.scopes import require_scope
from api.deps import IsRetry, Services, Use
from api.requests.parameters import Model
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.models import AddModelRequest, ModelDeleted, ModelObject, adapter_model, base_object
from api.schemas.pagination import ListPage, page_of
from catalog.inference.requests import inference_states
from catalog.registry import adapters, base_models
from catalog.registry.adapters import CheckpointModel
from catalog.tables.storage import BaseModelRow
from catalog.tenancy.authentication import Caller

router = Router(prefix="/v1/models", tags=["models"], responses=SIGNED)


@router.get("", operation_id="list_models")
def list_models(use: Use, caller: Signed) -> ListPage[ModelObject]:
    """List every base model with its `state`, then the project's own and shared adapters and stored checkpoints.

    `inference` shows which models can be called now.

    Contains the newest 1,000 adapters and the newest 1,000 checkpoints. If there are more, `has_more` is true, and
    `/v1/adapters` lists all adapters in pages. Requires the scope `adapters:read`.
    """
    shown = [_base(use, caller, row) for row in base_models.list_all(use.db)]
    own = adapters.list_models(use.db, project_id=caller.project_id)
    checkpoints = adapters.list_checkpoint_models(use.db, project_id=caller.project_id)
    shown += [adapter_model(row) for row in own.items]
    shown += [_checkpoint(model) for model in checkpoints.items]
    return page_of(_with_inference(use, shown), has_more=own.has_more or checkpoints.has_more)


@router.post("", operation_id="add_model", responses=errors(403, 409))
def add_model(body: AddModelRequest, use: Use, caller: Operator) -> ModelObject:
    """Add a base model under a name; a worker imports it. A repeated request is no error, and retries a failed import.

    Requires an operator key with the scope `models:write`.
    """
    row = base_models.add(
        use.db,
        name=body.name,
        kind=body.kind,
        source=body.source,
        revision=body.revision,
        chat_template=body.chat_template,
    )
    use.notifier.wake_workers()
    return _with_inference(use, [_base(use, caller, row)])[0]


@router.get("/{model:path}", operation_id="get_model", responses=errors(404))
def get_model(model: Model, use: Use, caller: Signed) -> ModelObject:
    """Return a base model, an adapter or a checkpoint by name. Requires the scope `adapters:read`."""
    if not model.startswith("ft:"):
        found = _base(use, caller, base_models.get(use.db, model))
    else:
        found = adapter_model(adapters.get(use.db, project_id=caller.project_id, name=model, param="model").adapter)
    return _with_inference(use, [found])[0]


@router.delete("/{model:path}", operation_id="delete_model", responses=errors(403, 404, 409))
def delete_model(model: Model, use: Use, caller: Signed, is_retry: IsRetry) -> ModelDeleted:
    """Delete an adapter, a checkpoint or a base model by name.

    Deleting a base model frees its name. Adapters trained on it stay, and workers remove its files within about an
    hour. Returns 409 while an unfinished job uses the base model. Deleting a checkpoint does not affect its job, which
    still resumes from it. Requires the scope `adapters:write`; for a base model, an operator key with the scope
    `models:write`.
    """
    require_scope(caller, "adapters:write" if model.startswith("ft:") else "models:write")
    if model.startswith("ft:"):
        adapters.delete(use.db, project_id=caller.project_id, name=model, is_client_retry=is_retry, param="model")
    else:
        base_models.delete(use.db, model, is_client_retry=is_retry)
    return ModelDeleted(id=model)


def _with_inference(use: Services, models: list[ModelObject]) -> list[ModelObject]:
    states = inference_states(use.db, [model.id for model in models])
    for model in models:
        model.inference = states[model.id]
    return models


def _base(use: Services, caller: Caller, row: BaseModelRow) -> ModelObject:
    folder = use.settings.bases_dir() / row.digest if row.digest else None
    local_path = str(folder) if folder is not None and folder.is_dir() else None
    return base_object(row, local_path=local_path, shows_paths=caller.is_operator)


def _checkpoint(model: CheckpointModel) -> ModelObject:
    return ModelObject(
        id=model.name,
        created=int(model.created_at),
        owned_by=model.project_id,
        kind="checkpoint",
        base=model.base_model,
        digest=model.artifact,
    )
