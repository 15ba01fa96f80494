"""/v1/fine_tuning/jobs: create, read and control jobs. Routes of events, metrics and logs are in job_history.py."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Body, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from api.auth.authentication import Signed
from api.deps import After, IsRetry, JobKey, Limit, Services, Use
from api.job_objects import job_objects
from api.requests.idempotency import identity_of
from api.requests.parameters import JobId, metadata_filter
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.jobs import JOB_REQUEST_EXAMPLES, FineTuningJob, JobBody, JobMove
from api.schemas.pagination import ListPage, page_of
from catalog.caller import Caller
from catalog.jobs import commands, submission
from catalog.lifecycle import queue_position
from catalog.tables.jobs import Job

router = Router(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning jobs"], responses=SIGNED)


Tags = Annotated[list[str] | None, Query(description="Return only jobs with this tag. May be repeated.")]


@router.post("", operation_id="create_job", responses=errors(404, 409, 413))
def create_job(
    body: Annotated[JobBody, Body(openapi_examples=JOB_REQUEST_EXAMPLES)],
    use: Use,
    caller: Signed,
    idempotency_key: JobKey = None,
    *,
    is_retry: IsRetry,
) -> FineTuningJob:
    """Create a job from the fields of the body, or from a plan with `plan`. A worker validates and trains it.

    Follow its events or its stream. The project's quotas and the key's daily job limit apply. Requires the scope
    `jobs:write`.
    """
    identity = identity_of(body, idempotency_key=idempotency_key, is_client_retry=is_retry)
    job = submission.made_before(use.db, caller=caller, **identity)
    if job is None:
        with _plan_fields_validated(body):
            job = submission.create(use.db, caller=caller, request=body, **identity)
    use.notifier.wake_workers()
    return _shown(use, caller, job)


@router.get("", operation_id="list_jobs")
def list_jobs(
    request: Request, use: Use, caller: Signed, *, after: After = None, limit: Limit = 20, tag: Tags = None
) -> ListPage[FineTuningJob]:
    """List the project's jobs, newest first.

    Filters: `metadata[KEY]=VALUE` selects jobs with this pair, `metadata=null` jobs without metadata, and `tag=NAME`
    jobs with this tag. Several filters select the jobs that match all of them. Requires the scope `jobs:read`.
    """
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
def get_job(job_id: JobId, use: Use, caller: Signed) -> FineTuningJob:
    """Return a job. Requires the scope `jobs:read`."""
    return _shown(use, caller, commands.get(use.db, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/cancel", operation_id="cancel_job", responses=errors(404, 409))
def cancel_job(job_id: JobId, use: Use, caller: Signed, is_retry: IsRetry) -> FineTuningJob:
    """Cancel a job. A waiting job is cancelled immediately; a running job is marked, and its worker stops it within
    seconds.

    Returns 409 for a job that is already final, except for a cancelled job if the client repeats a lost request.
    Requires the scope `jobs:write`.
    """
    job = commands.cancel(use.db, project_id=caller.project_id, job_id=job_id, is_client_retry=is_retry)
    return _shown(use, caller, job)


@router.post("/{job_id}/pause", operation_id="pause_job", responses=errors(404, 409))
def pause_job(job_id: JobId, use: Use, caller: Signed) -> FineTuningJob:
    """Pause a job. A running job stops within seconds and saves a checkpoint, from which it can be resumed.

    Requires the scope `jobs:write`.
    """
    return _shown(use, caller, commands.pause(use.db, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/resume", operation_id="resume_job", responses=errors(404, 409))
def resume_job(job_id: JobId, use: Use, caller: Signed, is_retry: IsRetry) -> FineTuningJob:
    """Resume a paused job at its step. The adapter is the one that an uninterrupted job would have produced.

    Returns 409 for a job that is not paused, except for a resumed job if the client repeats a lost request.
    Requires the scope `jobs:write`.
    """
    job = commands.resume(use.db, project_id=caller.project_id, job_id=job_id, is_client_retry=is_retry)
    use.notifier.wake_workers()
    return _shown(use, caller, job)


@router.post("/{job_id}/hold", operation_id="hold_job", responses=errors(404, 409))
def hold_job(job_id: JobId, use: Use, caller: Signed) -> FineTuningJob:
    """Hold a job: it stays in the queue but does not start until it is released. Its files are still prepared.

    Requires the scope `jobs:write`.
    """
    return _shown(use, caller, queue_position.hold(use.db, project_id=caller.project_id, job_id=job_id))


@router.post("/{job_id}/release", operation_id="release_job", responses=errors(404, 409))
def release_job(job_id: JobId, use: Use, caller: Signed) -> FineTuningJob:
    """Release a held job. It keeps its position in the queue. Requires the scope `jobs:write`."""
    job = queue_position.release(use.db, project_id=caller.project_id, job_id=job_id)
    use.notifier.wake_workers()
    return _shown(use, caller, job)


@router.post("/{job_id}/move", operation_id="move_job", responses=errors(404, 409))
def move_job(job_id: JobId, body: JobMove, use: Use, caller: Signed) -> FineTuningJob:
    """Move a job to another position among the project's waiting jobs of the same priority.

    The positions of other projects' jobs do not change. Requires the scope `jobs:write`.
    """
    target = queue_position.MoveTarget(before=body.before, after=body.after, to=body.to)
    return _shown(
        use, caller, queue_position.move_to(use.db, project_id=caller.project_id, job_id=job_id, target=target)
    )


@contextmanager
def _plan_fields_validated(body: BaseModel) -> Generator[None]:
    """The catalog validates the other fields of a body with `plan` together with the plan. Turn its error into the
    response that the same error has in a body without a plan."""
    try:
        yield
    except ValidationError as error:
        problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(problems, body=body.model_dump(mode="json", exclude_unset=True)) from error


def _shown(use: Services, caller: Caller, job: Job) -> FineTuningJob:
    return job_objects(use.db, [job], caller=caller)[0]
