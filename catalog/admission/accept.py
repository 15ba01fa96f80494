"""Validates job requests against the database, and resolves their configuration. Jobs and plans share it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import get_args

from sqlalchemy.orm import Session

from catalog.admission.parent import base_name, complete_from_parent, parent_of, parent_spec
from catalog.admission.target_layers import Targets
from catalog.datasets.formats import PREFERENCE, UNPAIRED, DataKind, RowKind, row_kind
from catalog.db.database import Database, get_once
from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest, LorryError, NotFound
from catalog.fleet import views
from catalog.lifecycle import queue_position
from catalog.registry import base_models
from catalog.resources import memory
from catalog.resources.pack_key import pack_key
from catalog.serving import endpoints, servability
from catalog.spec.data import check_data
from catalog.spec.integrations import install_hint
from catalog.spec.job import (
    FleetDefaults,
    JobRequest,
    JobSpec,
    check_evaluated_in_time,
    evaluations_too_late,
    interval_exceeds,
    most_steps,
    resolve,
)
from catalog.spec.lora import LoraSpec, begins_with_the_base, resolve_lora
from catalog.spec.methods import MethodType, compared_kind
from catalog.spec.training import BASE_LEARNING_RATE
from catalog.states import PriorityClass
from catalog.storage import files, token_cache
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, BaseModelRow, File
from catalog.tables.table import new_id
from catalog.tenancy.authentication import Caller

PURPOSE = "fine-tune"
NO_USUAL_RATE = {
    "sgd": ("SGD", BASE_LEARNING_RATE * 10, BASE_LEARNING_RATE * 1000),
    "adafactor": ("Adafactor", 0.1, 1.0),
}
"""Optimizers without a default learning rate, by type: name, and usual learning rates from lowest to highest."""
_MATCHING: dict[DataKind | None, str] = {
    None: "a file of chats, prompts with completions, or plain text",
    "preference": f"a file of preference pairs, one on each line: {PREFERENCE.form}",
    "unpaired": f"a file of labeled answers, one on each line: {UNPAIRED.form}",
}
"""The files that a method trains on, by the kind of answers that it compares."""
INSTALL_QUANT = "Install bitsandbytes on a worker (`pip install 'lorry-server[quant]'`), then restart the worker."
"""Remedy if no worker has bitsandbytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """An accepted request and its resolved configuration.

    The objects that it refers to are locked against deletion until the transaction ends.
    """

    request: JobRequest
    """The request as the client sent it."""
    spec: JobSpec
    base: BaseModelRow
    training: File
    validation: File | None
    cautions: tuple[ErrorText, ...]
    """Warnings about settings that are valid but probably unintended."""


def accept(
    session: Session,
    caller: Caller,
    request: JobRequest,
    *,
    now: float,
    seed: int,
    fleet_defaults: FleetDefaults | None = None,
) -> Accepted:
    """Validate a request and resolve its configuration.

    seed: used if the request sets none. fleet_defaults: None selects those of the live workers.

    Raises InvalidRequest and NotFound.
    """
    asked = request
    request, base, parent = _begin_from(session, caller, request)
    training = _usable_file(session, caller, request.training_file, "training_file", now=now)
    validation = None
    if request.validation_file is not None:
        validation = _usable_file(session, caller, request.validation_file, "validation_file", now=now)
    for file, param in ((training, "training_file"), (validation, "validation_file")):
        if file is not None:
            _check_kind(file, request.method_type, param)
            _check_template(file, base, param)
    _check_rates(request)
    _check_quantization(session, request, parent, now=now)
    _check_integrations(session, request, now=now)
    for file in (training, validation):
        if file is not None:
            check_data(request.data, row_kind(file.kind), file_id=file.id)
    _check_held_out(request)
    spec = resolve(
        request,
        num_rows=training.num_rows or 0,
        max_positions=(base.description or {}).get("max_positions"),
        seed=seed,
        fleet_defaults=fleet_defaults or views.fleet_defaults(session, now=now),
        parent=parent and parent_spec(parent),
    )
    _check_serving_target(session, request, spec, base)
    check_evaluated_in_time(spec, most_steps(spec, training.num_rows or 0))
    cautions = tuple(find_cautions(request, spec, training, validation))
    return Accepted(request=asked, spec=spec, base=base, training=training, validation=validation, cautions=cautions)


def resolve_targets(db: Database, caller: Caller, requests: Iterable[JobRequest]) -> Targets:
    """Resolve the target layers that `job_row` needs, before the transaction that accepts the jobs.

    An invalid request raises nothing here: the transaction rejects it, with the error that applies at that time.
    """
    shapes: list[tuple[BaseModelRow, LoraSpec]] = []
    with db.read() as session:
        for request in requests:
            with suppress(LorryError):
                completed, base, _ = _begin_from(session, caller, request)
                shapes.append((base, resolve_lora(completed.lora)))
    targets = Targets()
    for base, lora in shapes:
        targets.resolve(base, lora)
    return targets


def _begin_from(
    session: Session, caller: Caller, request: JobRequest
) -> tuple[JobRequest, BaseModelRow, Adapter | None]:
    """Return the request with what it inherits from a parent, the base model, and the parent."""
    parent = parent_of(session, request, project_id=caller.project_id)
    base = _usable_base(session, caller, base_name(request, parent))
    if parent is not None:
        request = complete_from_parent(session, request, parent, base)
    return request, base, parent


def job_row(accepted: Accepted, targets: Targets, *, project_id: str, created_by: str, now: float) -> Job:
    """Return the row of a new job, without a state.

    Raises InvalidRequest for layers that the base model doesn't have, and TargetsOutdated if the base model has changed
    since `resolve_targets`.
    """
    request, spec, base, validation = accepted.request, accepted.spec, accepted.base, accepted.validation
    assert base.digest is not None
    layers = targets.of(base, spec.lora, parent=spec.parent)
    return Job(
        id=new_id("ftjob"),
        project_id=project_id,
        created_at=now,
        created_by=created_by,
        state="",
        base_model=base.name,
        base_digest=base.digest,
        pack_key=pack_key(base.digest, spec.precision, spec.quantization),
        priority=PriorityClass[request.priority],
        place=queue_position.of_new(now, request.deadline),
        deadline=request.deadline,
        requested=request.model_dump(mode="json", exclude_unset=True),
        spec=spec.model_dump(mode="json"),
        parent_adapter=spec.parent.adapter if spec.parent else None,
        adapter_parameters=memory.adapter_parameters(layers, use_dora=spec.lora.use_dora),
        suffix=request.suffix,
        labels=request.metadata,
        tags=request.tags,
        training_file=accepted.training.id,
        validation_file=validation.id if validation else None,
        train_prepared=token_cache.key_of(project_id, base, accepted.training, spec),
        valid_prepared=validation and token_cache.key_of(project_id, base, validation, spec),
        attempt=0,
        counted_attempts=0,
        lease_extended=False,
        cancel_requested=False,
        pause_requested=False,
    )


def find_cautions(request: JobRequest, spec: JobSpec, training: File, validation: File | None) -> Iterator[ErrorText]:
    """Yield warnings about settings that are valid but probably unintended."""
    if validation is not None and validation.digest == training.digest:
        yield ErrorText.of(
            "validation_is_training" if validation.id == training.id else "validation_equals_training",
            validation=validation.id,
            training=training.id,
        )
    if request.max_length != "auto" and spec.max_length < request.max_length:
        yield ErrorText.of("max_length_lowered", requested=request.max_length, maximum=spec.max_length)
    num_steps = most_steps(spec, training.num_rows or 0)
    if num_steps is not None and interval_exceeds(spec, num_steps):
        yield evaluations_too_late(spec, num_steps)


def _usable_base(session: Session, caller: Caller, name: str) -> BaseModelRow:
    """Return the base model, locked against deletion until the job that refers to it exists."""
    base = base_models.find(session, name, lock="share")
    if base.state == "importing":
        raise InvalidRequest("model_not_ready", name=name, param="model")
    if base.state != "ready":
        raise _import_failed(base, is_operator=caller.is_operator)
    return base


def _import_failed(base: BaseModelRow, *, is_operator: bool) -> InvalidRequest:
    """Build the error. Only operators see the import's own message and remedy, which may quote folders and logs."""
    error = base.error or {}
    code = str(error.get("code", "import_failed"))
    if not is_operator:
        return InvalidRequest("model_import_failed", name=base.name, reason=code, param="model")
    own = ErrorText.of("model_import_failed_for_operators", name=base.name, reason=code, param="model")
    reason = str(error.get("message") or "")
    if reason.startswith(f"The import of base model {base.name!r} "):
        own = replace(own, message=reason)
    elif reason:
        reason = reason.rstrip(" .")
        own = ErrorText.of("model_import_failed_for_operators", name=base.name, reason=reason, param="model")
    if remedy := error.get("remedy"):
        own = replace(own, remedy=f"{remedy} Or choose another base model.")
    return InvalidRequest(own)


def _usable_file(session: Session, caller: Caller, file_id: str, param: str, *, now: float) -> File:
    """Return the file, locked against deletion until the job that uses it exists."""
    file = get_once(session, File, file_id, lock="share")
    if file is None or file.project_id != caller.project_id or file.deleted_at is not None:
        raise NotFound("input_file_not_found", file_id=file_id, param=param)
    if files.has_expired(file, now=now):
        raise NotFound("input_file_expired", file_id=file_id, field=param, param=param)
    if file.purpose != PURPOSE:
        raise InvalidRequest("wrong_file_purpose", file_id=file_id, purpose=file.purpose, field=param, param=param)
    if not file.num_rows:
        raise InvalidRequest("empty_file", file_id=file_id, field=param, param=param)
    return file


def _check_kind(file: File, method: MethodType, param: str) -> None:
    """Raise InvalidRequest if the method can't train on the file's kind of rows: pairs, labeled answers, or neither."""
    kind, wanted = row_kind(file.kind), compared_kind(method)
    if wanted == _compared(kind):
        return
    methods = [repr(name) for name in get_args(MethodType) if compared_kind(name) == _compared(kind)]
    if param == "training_file":
        raise InvalidRequest(
            "wrong_training_file_kind",
            file=file.id,
            rows=kind.plural,
            method=method,
            methods=" or ".join(", ".join(methods).rsplit(", ", 1)),
            matching=_MATCHING[wanted],
            param=param,
        )
    raise InvalidRequest(
        "wrong_validation_file_kind",
        file=file.id,
        rows=kind.plural,
        method=method,
        matching=_MATCHING[wanted],
        param=param,
    )


def _check_template(file: File, base: BaseModelRow, param: str) -> None:
    """Raise InvalidRequest for a file of conversations and a base model that can't render them.

    Prompts with completions may be text or messages, so only the tokenizer finds those of messages.
    """
    if file.kind not in ("chat", "preference") or (base.description or {}).get("has_chat_template", True):
        return
    raise InvalidRequest(
        "base_has_no_chat_template_for_file",
        file=file.id,
        rows=row_kind(file.kind).plural,
        base=base.name,
        param=param,
    )


def _compared(kind: RowKind) -> DataKind | None:
    return kind.name if kind in (PREFERENCE, UNPAIRED) else None


def _check_quantization(session: Session, request: JobRequest, parent: Adapter | None, *, now: float) -> None:
    """Raise InvalidRequest if no live worker can load the base model so. Without live workers, the job is accepted.

    parent: the adapter from which the request inherits the quantization.
    """
    if request.quantization == "none":
        return
    if request.lora.use_dora:
        raise InvalidRequest(
            "dora_unsupported_with_quantization", quantization=request.quantization, param="lora.use_dora"
        )
    if begins_with_the_base(request.lora.init_lora_weights):
        raise InvalidRequest(
            "init_unsupported_with_quantization",
            init_lora_weights=request.lora.init_lora_weights,
            quantization=request.quantization,
            param="lora.init_lora_weights",
        )
    found = views.quantizations(session, now=now)
    if found is None or request.quantization in found:
        return
    if parent is None:
        raise InvalidRequest("quantization_unavailable", quantization=request.quantization, param="quantization")
    raise InvalidRequest(
        "quantization_unavailable_for_parent",
        quantization=request.quantization,
        parent=parent.name,
        param="quantization",
    )


def _check_integrations(session: Session, request: JobRequest, *, now: float) -> None:
    """Raise InvalidRequest if no live worker can write to a requested tracker.

    Without live workers, the job is accepted, and its curves wait for a worker that can write them.
    """
    if not request.integrations:
        return
    found = views.integrations(session, now=now)
    for number, one in enumerate(request.integrations):
        if found is not None and one.type not in found:
            raise InvalidRequest(
                "integration_unavailable",
                kind=one.type,
                install_hint=install_hint(one.type),
                param=f"integrations.{number}.type",
            )
        if one.wandb is not None and one.wandb.entity is not None:
            raise InvalidRequest(
                "integration_entity_not_allowed", entity=one.wandb.entity, param=f"integrations.{number}.wandb.entity"
            )


def _check_rates(request: JobRequest) -> None:
    """Raise InvalidRequest if the learning rate is missing or contradictory.

    Both fields may be set if they agree, as in a copy of a job's resolved values.
    """
    multiplier, rate = request.method_hyperparameters().learning_rate_multiplier, request.optimizer.learning_rate
    optimizer = request.optimizer.type
    if optimizer in NO_USUAL_RATE and multiplier == "auto" and rate == "auto":
        name, lowest, highest = NO_USUAL_RATE[optimizer]
        raise InvalidRequest(
            "learning_rate_required", name=name, lowest=lowest, highest=highest, param="optimizer.learning_rate"
        )
    if multiplier == "auto" or rate == "auto" or math.isclose(rate, BASE_LEARNING_RATE * multiplier, rel_tol=1e-6):
        return
    multiplied = multiplier * BASE_LEARNING_RATE
    raise InvalidRequest(
        "conflicting_learning_rates",
        rate=rate,
        multiplier=multiplier,
        multiplied=multiplied,
        param="optimizer.learning_rate",
    )


def _check_held_out(request: JobRequest) -> None:
    """Raise InvalidRequest if a field depends on evaluations and the job has no validation file."""
    if request.validation_file is not None:
        return
    keep, every = request.evaluation.keep, request.evaluation.every_steps
    for field, is_asked in (
        ("early_stopping", request.early_stopping is not None),
        ("evaluation.keep", keep == "best"),
        ("evaluation.every_steps", every != "auto"),
        ("evaluation.samples", request.evaluation.samples is not None),
    ):
        if is_asked:
            raise InvalidRequest("validation_file_required", field=field, param=field)


def _check_serving_target(session: Session, request: JobRequest, spec: JobSpec, base: BaseModelRow) -> None:
    """Raises NotFound for an unknown endpoint, and InvalidRequest if it can't serve the adapter of the job."""
    name = request.must_serve_on
    if name is None:
        return
    max_rank = None
    if name not in endpoints.ENGINES:
        target = endpoints.find(session, name, param="must_serve_on")
        if target.base_digest != base.digest:
            raise InvalidRequest(
                "endpoint_of_another_base",
                name=name,
                base_model=target.base_model,
                base=base.name,
                param="must_serve_on",
            )
        max_rank = target.max_rank
    architecture = (base.description or {}).get("architecture")
    reason = servability.why_not_vllm(spec, architecture=architecture, max_rank=max_rank)
    if reason is not None:
        raise InvalidRequest("adapter_not_servable_on", name=name, reason=reason, param="must_serve_on")
