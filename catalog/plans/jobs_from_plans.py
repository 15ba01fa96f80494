"""Creates jobs from plans. A job that would differ from its plan is rejected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy.orm import Session

from catalog.admission.accept import Accepted, accept
from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.plans import plans
from catalog.spec.job import FleetDefaults, JobRequest, JobSpec, PlannedJob
from catalog.spec.model_fields import value_at
from catalog.spec.validation_messages import value_text
from catalog.tables.jobs import Plan
from catalog.tenancy.authentication import Caller

WHOLE = frozenset({"metadata", "lora.rank_pattern", "lora.alpha_pattern", "evaluation.samples"})
"""Fields whose value is an object and is compared as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedPlan:
    """A plan from which a job is created. Its request and spec never change."""

    plan: str
    """Id of the plan."""
    request: JobRequest
    spec: JobSpec


def agree(db: Database, caller: Caller, body: PlannedJob) -> AgreedPlan:
    """Read the plan that the body names.

    Call it outside the transaction that accepts the job, because parsing the request compiles patterns. Raises
    NotFound, Conflict if the body differs from the plan, and pydantic's ValidationError for fields that a job lacks.
    """
    plan = plans.get(db, project_id=caller.project_id, plan_id=body.plan)
    request, spec = JobRequest.model_validate(plan.requested), JobSpec.model_validate(plan.spec)
    _check_agrees(body, plan, request, spec)
    return AgreedPlan(plan=plan.id, request=request, spec=spec)


def accept_planned(session: Session, caller: Caller, agreed: AgreedPlan, *, now: float) -> Accepted:
    """Accept the job of a plan. Raises what `accept` raises, and Conflict if the plan has failed or is out of date."""
    plan = plans.find(session, project_id=caller.project_id, plan_id=agreed.plan)
    request, spec = agreed.request, agreed.spec
    if plan.state == "failed":
        raise Conflict("plan_failed", plan=plan.id, error=(plan.error or {}).get("message", "unknown."), param="plan")
    accepted = accept(session, caller, request, now=now, seed=spec.seed, fleet_defaults=FleetDefaults.of(spec))
    if accepted.base.digest != plan.base_digest:
        raise _outdated(plan, f"base model {plan.base_model!r} has changed since the plan was created")
    if accepted.spec != spec:
        raise _outdated(plan, difference(accepted.spec, spec))
    return accepted


def difference(now: JobSpec, planned: JobSpec) -> str:
    """Return how the configuration of a job now differs from the plan's."""
    before = dict(_leaves(planned.model_dump(mode="json")))
    for path, value in _leaves(now.model_dump(mode="json")):
        if path in before and before[path] != value:
            return f"its request now resolves to {path} {value_text(value)} instead of {value_text(before[path])}"
    return "its request now resolves to another job configuration"


def _check_agrees(body: PlannedJob, plan: Plan, request: JobRequest, spec: JobSpec) -> None:
    given = body.model_extra or {}
    JobRequest.model_validate({**plan.requested, **given})
    whole = request.model_dump(mode="json") | {"seed": spec.seed}
    planned = dict(_leaves(whole))
    for path, value in _leaves(given):
        is_unset = path == "seed" and value is None and request.seed is None
        if not is_unset and (path not in planned or planned[path] != value):
            raise Conflict(
                "differs_from_plan",
                path=path,
                given=value_text(value),
                planned=value_text(value_at(whole, path)),
                plan=plan.id,
                param=path,
            )


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of each field."""
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in WHOLE:
            yield from _leaves(cast("dict[str, Any]", value), f"{path}.")
        else:
            yield path, value


def _outdated(plan: Plan, why: str) -> Conflict:
    return Conflict("plan_outdated", plan=plan.id, why=why, param="plan")
