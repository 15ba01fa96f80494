"""/v1/fine_tuning/jobs: create, read and control jobs. job_history.py has the routes of events, metrics and logs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Body, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Services, Use
from api.job_objects import job_objects
from api.requests.idempotency import identity_of
from api.requests.query_parameters import metadata_filter
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.jobs import JOB_REQUEST_EXAMPLES, FineTuningJob, JobBody, JobMove
from api.schemas.pagination import ListPage, page_of
from catalog.caller import Caller
from catalog.jobs import commands, submission
from catalog.lifecycle import queue_position
from catalog.tables.jobs import Job

router = Router(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning jobs"], responses=SIGNED)


Tags = Annotated[list[str] | None, Query(description="Jobs with this tag. It may be said several times.")]


@router.post("", operation_id="create_job", responses=errors(404, 409, 413))
def create_job(
    body: Annotated[JobBody, Body(openapi_examples=JOB_REQUEST_EXAMPLES)],
    use: Use,
    caller: Signed,
    idempotency_key: Annotated[
        str | None, Header(max_length=255, pattern=r"^[\x21-\x7e]+$", description="One per job: again is the same job.")
    ] = None,
    *,
    is_retry: IsRetry,
) -> FineTuningJob:
    """Queue a job, or with `plan` the one that was planned. It is validated and trained by a worker; follow its
    events, or its stream."""
    identity = identity_of(body, idempotency_key=idempotency_key, is_client_retry=is_retry)
    job = submission.made_before(use.db, caller=caller, **identity)
    if job is None:
        with _plan_fields_validated(body):
            job = submission.create(use.db, caller=caller, request=body, **identity)
    use.doorbell.ring()
    return _shown(use, caller, job)


@router.get("", operation_id="list_jobs")
def list_jobs(
    request: Request, use: Use, caller: Signed, *, after: After = None, limit: Limit = 20, tag: Tags = None
) -> ListPage[FineTuningJob]:
    """The project's jobs, newest first. `metadata[k]=v` chooses by a pair, `metadata=null` those without any, and
    `tag=NAME` by a tag; of several, those with all of them."""
    page = commands.list_page(
        use.db,
        project_id=caller.project_id,
        after=after,
        limit=limit,
        metadata=metadata_filter(request.query_params),
        tags=tag or (),
    )
    return page_of(job_objects(use.db, page.items, caller=caller), has_more=page.has_more)


@router.get("/{job_id}", operation_id="get_job", responses=errors(404))
def get_job(job_id: str, use: Use, caller: Signed) -> FineTuningJob:
    return _shown(use, caller, commands.get(use.db, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/cancel", operation_id="cancel_job", responses=errors(404, 409))
def cancel_job(job_id: str, use: Use, caller: Signed, is_retry: IsRetry) -> FineTuningJob:
    """At once where it waits; a running job is marked, and its worker obeys within seconds.

    A job that is final already is a conflict, save a cancelled one where the client repeats a lost request.
    """
    job = commands.cancel(use.db, project_id=caller.project_id, job_id=job_id, is_client_retry=is_retry)
    return _shown(use, caller, job)


@router.post("/{job_id}/pause", operation_id="pause_job", responses=errors(404, 409))
def pause_job(job_id: str, use: Use, caller: Signed) -> FineTuningJob:
    """Stop, with a checkpoint to go on from."""
    return _shown(use, caller, commands.pause(use.db, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/resume", operation_id="resume_job", responses=errors(404, 409))
def resume_job(job_id: str, use: Use, caller: Signed, is_retry: IsRetry) -> FineTuningJob:
    """Go on from the last checkpoint: the adapter will be the one that an unbroken job would have given.

    A job that isn't paused is a conflict, save one that goes on already where the client repeats a lost request.
    """
    job = commands.resume(use.db, project_id=caller.project_id, job_id=job_id, is_client_retry=is_retry)
    use.doorbell.ring()
    return _shown(use, caller, job)


@router.post("/{job_id}/hold", operation_id="hold_job", responses=errors(404, 409))
def hold_job(job_id: str, use: Use, caller: Signed) -> FineTuningJob:
    """Keep it in the queue and out of every trainer, until it is released. Its files are prepared meanwhile."""
    return _shown(use, caller, queue_position.hold(use.db, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/release", operation_id="release_job", responses=errors(404, 409))
def release_job(job_id: str, use: Use, caller: Signed) -> FineTuningJob:
    """Let a held job be chosen again, in its old place."""
    job = queue_position.release(use.db, project_id=caller.project_id, job_id=job_id)
    use.doorbell.ring()
    return _shown(use, caller, job)


@router.post("/{job_id}/move", operation_id="move_job", responses=errors(404, 409))
def move_job(job_id: str, body: JobMove, use: Use, caller: Signed) -> FineTuningJob:
    """Give it another place among the project's jobs of its class that wait. Other projects' turns stay as they are."""
    target = queue_position.MoveTarget(before=body.before, after=body.after, to=body.to)
    return _shown(
        use, caller, queue_position.move_to(use.db, project_id=caller.project_id, job_id=job_id, target=target)
    )


@contextmanager
def _plan_fields_validated(body: BaseModel) -> Generator[None]:
    """The fields beside `plan` are validated with the plan, in the catalog. The response to an invalid one is the same
    as for a body without a plan."""
    try:
        yield
    except ValidationError as error:
        problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(problems, body=body.model_dump(mode="json", exclude_unset=True)) from error


def _shown(use: Services, caller: Caller, job: Job) -> FineTuningJob:
    return job_objects(use.db, [job], caller=caller)[0]
