"""A job that continues an adapter: which one it is, and what of the job is then the parent's and not for it to say.

The child computes with the same A and B, so all that gives them their meaning (layers, ranks, scale, how the base is
held) is the parent's; it may be said again, but not otherwise. What only training reads is the job's own.
"""

from __future__ import annotations

import math
from typing import Any, cast

from sqlalchemy.orm import Session

from catalog.errors import InvalidRequest
from catalog.registry import adapters
from catalog.spec.job import JobRequest, JobSpec, ParentSpec
from catalog.spec.lora import LoraSpec
from catalog.tables import Adapter, BaseModelRow, Job

NAME_PREFIX = "ft:"
"""Of an adapter's name; a base model's holds no colon."""
OF_TRAINING = frozenset({"dropout"})
"""Fields of `lora` that say nothing about an adapter's numbers."""


def parent_of(session: Session, request: JobRequest, *, project_id: str) -> Adapter | None:
    """The adapter that the request continues, by `parent_adapter` or as its `model`, locked against deletion until
    the job that names it exists. It may be a checkpoint, or shared by another project. Raises NotFound, also for what
    the project may not read; NoLongerKept for a checkpoint; InvalidRequest where the two differ."""
    named = None
    if request.model.startswith(NAME_PREFIX):
        named = adapters.find(session, project_id, request.model, locked=True, param="model")
    if request.parent_adapter is None:
        return named
    parent = adapters.find(session, project_id, request.parent_adapter, locked=True, param="parent_adapter")
    if named is not None and named.id != parent.id:
        raise InvalidRequest(
            f"The model is the adapter {named.name!r}, and parent_adapter is {parent.name!r}: a job continues one.",
            code="two_parents",
            remedy="Give one of the two; the model may then be the base model's name.",
            param="parent_adapter",
        )
    return parent


def check_base(parent: Adapter, base: BaseModelRow) -> None:
    """Two names of one digest are one base."""
    if parent.base_digest == base.digest:
        return
    raise InvalidRequest(
        f"The adapter {parent.name!r} was trained on another base model than {base.name!r} is now.",
        code="parent_of_another_base",
        remedy=f"Its base model was {parent.base_model!r}, with the digest {parent.base_digest}.",
        param="parent_adapter",
    )


def parent_spec(parent: Adapter) -> ParentSpec:
    return ParentSpec(adapter=parent.id, name=parent.name, artifact=parent.artifact, lineage=parent.lineage_id)


def completed(session: Session, request: JobRequest, parent: Adapter) -> JobRequest:
    """The request with what is the parent's filled in. Raises InvalidRequest for what it says otherwise."""
    trained = JobSpec.model_validate(session.get_one(Job, parent.job_id).spec)
    lora = as_exported(trained.lora)
    _check_lora(request, lora)
    if "quantisation" in request.model_fields_set and request.quantisation != trained.quantisation:
        raise _differs("quantisation", request.quantisation, trained.quantisation)
    theirs = lora.model_dump(exclude=set(OF_TRAINING & request.lora.model_fields_set))
    return request.model_copy(
        update={"lora": request.lora.model_copy(update=theirs), "quantisation": trained.quantisation}
    )


def as_exported(lora: LoraSpec) -> LoraSpec:
    """The shape of the adapter's files: one that began with a part of the base is a plain one of twice the rank."""
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


def _check_lora(request: JobRequest, theirs: LoraSpec) -> None:
    asked = request.lora
    for name in sorted(asked.model_fields_set - OF_TRAINING):
        given = getattr(asked, name)
        if given != "auto" and _plain(given) != _plain(getattr(theirs, name)):
            raise _differs(f"lora.{name}", given, getattr(theirs, name))


def _differs(field: str, given: object, theirs: object) -> InvalidRequest:
    reason = f"{field} is {given!r}, and the parent adapter has {theirs!r}."
    if field == "lora.init_lora_weights":
        reason = f"{field} is {given!r}, and a job that continues an adapter begins with its weights."
    return InvalidRequest(
        reason,
        code="differs_from_parent",
        remedy=f"Leave {field} out, and it is the parent's; or train without a parent.",
        param=field,
    )


def _plain(value: Any) -> Any:
    """The order of names and of numbers of blocks says nothing."""
    return sorted(set(cast("list[Any]", value))) if isinstance(value, list) else value
