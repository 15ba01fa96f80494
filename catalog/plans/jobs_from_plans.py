"""A job that is created from a plan: just as planned, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy.orm import Session

from catalog.admission.accept import Accepted, accept
from catalog.db.database import Database
from catalog.errors import Conflict
from catalog.plans import plans
from catalog.spec.job import JobRequest, JobSpec, PlannedJob
from catalog.tables.plans import Plan
from catalog.tenancy.authentication import Caller

WHOLE = frozenset({"metadata", "lora.rank_pattern", "lora.alpha_pattern", "evaluation.samples"})
"""Fields that are objects and one value."""
PLAN_AGAIN = "Make a plan anew, and look at what it says; POST /v1/plans takes a job's body."


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreedPlan:
    """A plan that a job is to be created from, whose request and numbers never change."""

    plan: str
    """Its id."""
    request: JobRequest
    spec: JobSpec


def agree(db: Database, caller: Caller, body: PlannedJob) -> AgreedPlan:
    """Read the plan that the body names, outside of the transaction that accepts the job: parsing it compiles patterns.

    Raises NotFound; Conflict where the body says otherwise than the plan; pydantic's ValidationError for fields that a
    job doesn't have.
    """
    plan = plans.get(db, project_id=caller.project_id, plan_id=body.plan)
    request, spec = JobRequest.model_validate(plan.requested), JobSpec.model_validate(plan.spec)
    _check_agrees(body, plan, request, spec)
    return AgreedPlan(plan=plan.id, request=request, spec=spec)


def accept_planned(session: Session, caller: Caller, agreed: AgreedPlan, *, now: float) -> Accepted:
    """Raises what `accept` does; Conflict where the plan has failed or holds no more."""
    plan = plans.find(session, project_id=caller.project_id, plan_id=agreed.plan)
    request, spec = agreed.request, agreed.spec
    if plan.state == "failed":
        raise Conflict(
            f"The plan {plan.id} has failed: {(plan.error or {}).get('message', '')}".strip(),
            code="plan_failed",
            remedy="A job would fail in the same way. Mend that, and plan again.",
            param="plan",
        )
    accepted = accept(session, caller, request, now=now, seed=spec.seed, auto_precision=spec.precision)
    if accepted.base.digest != plan.base_digest:
        raise _outdated(plan, f"the base model {plan.base_model!r} is another one by now")
    if accepted.spec != spec:
        raise _outdated(plan, "the same request comes to other numbers by now")
    return accepted


def _check_agrees(body: PlannedJob, plan: Plan, request: JobRequest, spec: JobSpec) -> None:
    given = body.model_extra or {}
    JobRequest.model_validate({**plan.requested, **given})
    planned = dict(_leaves(request.model_dump(mode="json")))
    for path, value in _leaves(given):
        if path == "seed" and value == spec.seed:
            continue
        if path not in planned or planned[path] != value:
            raise Conflict(
                f"{path} is {value!r}, and the plan {plan.id} has {planned.get(path)!r}.",
                code="differs_from_plan",
                remedy=f"Leave {path} out, or plan anew with it: a job from a plan is just as planned.",
                param=path,
            )


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """By dotted path."""
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in WHOLE:
            yield from _leaves(cast("dict[str, Any]", value), f"{path}.")
        else:
            yield path, value


def _outdated(plan: Plan, why: str) -> Conflict:
    return Conflict(f"The plan {plan.id} holds no more: {why}.", code="plan_outdated", remedy=PLAN_AGAIN, param="plan")
