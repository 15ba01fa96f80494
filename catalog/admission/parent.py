"""The parent of a job: the adapter or checkpoint whose training it continues, and the settings that it inherits."""

from __future__ import annotations

import math
from typing import Any, cast

from sqlalchemy.orm import Session

from catalog.errors import InvalidRequest
from catalog.registry import adapters
from catalog.spec.job import JobRequest, JobSpec, ParentSpec
from catalog.spec.lora import LoraSpec
from catalog.spec.validation_messages import value_text
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, BaseModelRow

NAME_PREFIX = "ft:"
"""Prefix of adapter names. Names of base models contain no colon."""
OF_TRAINING = frozenset({"dropout"})
"""Fields of `lora` that affect only training, not the shape or scale of the adapter."""


def parent_of(session: Session, request: JobRequest, *, project_id: str) -> Adapter | None:
    """Return the adapter that the request continues, from `parent_adapter` or `model`; None if there is none.

    The adapter is locked against deletion until the job that refers to it exists. It may be a checkpoint, or shared by
    another project. Raises NotFound, also for adapters that the project may not read; NoLongerKept for a checkpoint;
    InvalidRequest if both fields name different adapters.
    """
    named = None
    if request.model.startswith(NAME_PREFIX):
        named = adapters.find(session, project_id, request.model, locked=True, param="model")
    if request.parent_adapter is None:
        return named
    parent = adapters.find(session, project_id, request.parent_adapter, locked=True, param="parent_adapter")
    if named is not None and named.id != parent.id:
        raise InvalidRequest("two_parents", named=named.name, parent=parent.name, param="parent_adapter")
    return parent


def base_name(request: JobRequest, parent: Adapter | None) -> str:
    """Return the name of the base model: `model`, unless it names the parent."""
    is_base_named = not request.model.startswith(NAME_PREFIX)
    return request.model if is_base_named or parent is None else parent.base_model


def parent_spec(parent: Adapter) -> ParentSpec:
    return ParentSpec(adapter=parent.id, name=parent.name, artifact=parent.artifact, lineage=parent.lineage_id)


def complete_from_parent(session: Session, request: JobRequest, parent: Adapter, base: BaseModelRow) -> JobRequest:
    """Fill in the settings that the request inherits from the parent. Raises InvalidRequest for conflicting values, and
    for a parent on another base model."""
    _check_base(request, parent, base)
    trained = JobSpec.model_validate(session.get_one(Job, parent.job_id).spec)
    lora = exported_shape(trained.lora)
    _check_lora(request, lora, parent)
    if "quantization" in request.model_fields_set and request.quantization != trained.quantization:
        raise _differs("quantization", request.quantization, trained.quantization, parent)
    parent_lora = lora.model_dump(exclude=set(OF_TRAINING & request.lora.model_fields_set))
    return request.model_copy(
        update={"lora": request.lora.model_copy(update=parent_lora), "quantization": trained.quantization}
    )


def _check_base(request: JobRequest, parent: Adapter, base: BaseModelRow) -> None:
    """Raise InvalidRequest if the digests differ. Two names with the same digest are the same base model."""
    if parent.base_digest == base.digest:
        return
    param = "model" if request.parent_adapter is None else "parent_adapter"
    if parent.base_model != base.name:
        raise InvalidRequest(
            "parent_of_another_base", parent=parent.name, base_model=parent.base_model, base=base.name, param=param
        )
    raise InvalidRequest(
        "parent_of_earlier_base",
        parent=parent.name,
        base=base.name,
        base_digest=parent.base_digest,
        digest=str(base.digest),
        param=param,
    )


def exported_shape(lora: LoraSpec) -> LoraSpec:
    """Return the shape of the exported adapter.

    An adapter that was initialized from the base model's weights (PiSSA, OLoRA) is exported as a plain adapter of twice
    the rank.
    """
    if not lora.begins_with_the_base:
        return lora.model_copy(update={"init_lora_weights": "default"})
    times = math.sqrt(2) if lora.use_rslora else 2
    return lora.model_copy(
        update={
            "rank": 2 * lora.rank,
            "alpha": times * lora.alpha,
            "rank_pattern": {key: 2 * rank for key, rank in lora.rank_pattern.items()},
            "alpha_pattern": {key: times * alpha for key, alpha in lora.alpha_pattern.items()},
            "init_lora_weights": "default",
        }
    )


def _check_lora(request: JobRequest, parent_lora: LoraSpec, parent: Adapter) -> None:
    asked = request.lora
    for name in sorted(asked.model_fields_set - OF_TRAINING):
        given = getattr(asked, name)
        if given != "auto" and _plain(given) != _plain(getattr(parent_lora, name)):
            raise _differs(f"lora.{name}", given, getattr(parent_lora, name), parent)


def _differs(field: str, given: object, parent_value: object, parent: Adapter) -> InvalidRequest:
    reason = f"parent adapter {parent.name!r} has {value_text(parent_value)}"
    if field == "lora.init_lora_weights":
        reason = f"the job starts from the weights of parent adapter {parent.name!r}"
    return InvalidRequest("differs_from_parent", field=field, value_text=value_text(given), reason=reason, param=field)


def _plain(value: Any) -> Any:
    """Sort lists: the order of names and of block numbers has no meaning."""
    return sorted(set(cast("list[Any]", value))) if isinstance(value, list) else value
