"""Checks the field must_serve_on: a job whose adapter the server could not serve is rejected before training."""

from __future__ import annotations

from sqlalchemy.orm import Session

from catalog.errors import InvalidRequest
from catalog.serving import endpoints, servability
from catalog.spec.job import JobRequest, JobSpec
from catalog.tables.storage import BaseModelRow


def check_serving_target(session: Session, request: JobRequest, spec: JobSpec, base: BaseModelRow) -> None:
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
