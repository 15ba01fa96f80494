"""/v1/sweeps: groups of jobs that differ in chosen fields, their leaderboards, and operations on them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body, Header, Path, Request
from fastapi.openapi.models import Example

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.requests.idempotency import identity_of
from api.requests.parameters import SweepId
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.sweeps import SweepObject, TrialObject, sweep_object, trial_object
from catalog.spec.sweep import MAX_TRIALS, SweepRequest
from catalog.sweeps import controller, creation, queries

router = Router(prefix="/v1/sweeps", tags=["sweeps"], responses=SIGNED)
Number = Annotated[int, Path(ge=0, lt=MAX_TRIALS, description="Number of the trial, from 0.")]
EXAMPLES: dict[str, Example] = {
    "tpe": {
        "value": {
            "model": "smollm2-135m",
            "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
            "validation_file": "file-4a3b8c9d0a1e4f5a6b7c8d9e",
            "parameters": {
                "optimizer.learning_rate": {"min": 1e-5, "max": 1e-3, "scale": "log"},
                "lora.rank": {"values": [4, 8, 16]},
            },
            "search": {"type": "tpe", "trials": 20, "pruner": "asha"},
        }
    }
}


@router.post("", operation_id="create_sweep", responses=errors(404, 409, 413))
def create_sweep(
    body: Annotated[SweepRequest, Body(openapi_examples=EXAMPLES)],
    use: Use,
    caller: Signed,
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            description="Identifies the submission. A repeated request with the same key returns the same sweep.",
        ),
    ] = None,
    *,
    is_retry: IsRetry,
) -> SweepObject:
    """Create a sweep of up to 1,000 trials. Each trial is a job with the fields of the body and its own parameters.

    All trials are validated before the first one is created; for tpe, random ones in their place. Each trial counts as
    one request of the key. Requires the scope `jobs:write`.
    """
    identity = identity_of(body, idempotency_key=idempotency_key, is_client_retry=is_retry)
    sweep = creation.made_before(use.db, caller=caller, **identity)
    is_new = sweep is None
    if sweep is None:
        sweep = creation.create(use.db, caller=caller, request=body, **identity)
    use.notifier.wake_workers()
    view = queries.get(use.db, project_id=caller.project_id, sweep_id=sweep.id)
    if is_new:
        request.state.headers |= use.limits.charge(caller, view.sweep.num_trials)
    return sweep_object(view)


@router.get("", operation_id="list_sweeps")
def list_sweeps(use: Use, caller: Signed, after: After = None, limit: Limit = 20) -> ListPage[SweepObject]:
    """List the project's sweeps, newest first. Requires the scope `jobs:read`."""
    page = queries.list_page(use.db, project_id=caller.project_id, after=after, limit=limit)
    return page_of([sweep_object(view) for view in page.items], has_more=page.has_more)


@router.get("/{sweep_id}", operation_id="get_sweep", responses=errors(404))
def get_sweep(sweep_id: SweepId, use: Use, caller: Signed) -> SweepObject:
    """Return a sweep. Requires the scope `jobs:read`."""
    return sweep_object(queries.get(use.db, project_id=caller.project_id, sweep_id=sweep_id))


@router.post("/{sweep_id}/cancel", operation_id="cancel_sweep", responses=errors(404, 409))
def cancel_sweep(sweep_id: SweepId, use: Use, caller: Signed, is_retry: IsRetry) -> SweepObject:
    """Cancel a sweep: it creates no more trials, and unfinished ones are cancelled within seconds. Adapters stay.

    Requires the scope `jobs:write`.
    """
    queries.cancel(use.db, project_id=caller.project_id, sweep_id=sweep_id, is_client_retry=is_retry)
    controller.advance(use.db, sweep_id)
    return get_sweep(sweep_id, use, caller)


@router.post("/{sweep_id}/close", operation_id="close_sweep", responses=errors(404))
def close_sweep(sweep_id: SweepId, use: Use, caller: Signed) -> SweepObject:
    """Close a sweep: no more trials are created. Existing ones continue, and then the best one is promoted.

    Requires the scope `jobs:write`.
    """
    queries.close(use.db, project_id=caller.project_id, sweep_id=sweep_id)
    controller.advance(use.db, sweep_id)
    return get_sweep(sweep_id, use, caller)


@router.get("/{sweep_id}/trials", operation_id="list_trials", responses=errors(404))
def list_trials(
    sweep_id: SweepId, use: Use, caller: Signed, after: After = None, limit: Limit = 20
) -> ListPage[TrialObject]:
    """List the trials as a leaderboard: the best first, those without a value last.

    Values of running trials can change between pages. Requires the scope `jobs:read`.
    """
    page = queries.leaderboard(use.db, project_id=caller.project_id, sweep_id=sweep_id, after=after, limit=limit)
    return page_of([trial_object(view) for view in page.items], has_more=page.has_more)


@router.get("/{sweep_id}/trials/{number}", operation_id="get_trial", responses=errors(404))
def get_trial(sweep_id: SweepId, number: Number, use: Use, caller: Signed) -> TrialObject:
    """Return a trial. Requires the scope `jobs:read`."""
    return trial_object(queries.trial(use.db, project_id=caller.project_id, sweep_id=sweep_id, number=number))


@router.post("/{sweep_id}/trials/{number}/stop", operation_id="stop_trial", responses=errors(404, 409))
def stop_trial(sweep_id: SweepId, number: Number, use: Use, caller: Signed, is_retry: IsRetry) -> TrialObject:
    """Stop a trial before its last step, for example because it performs badly.

    It produces no adapter, and its job ends as `cancelled` with the reason `pruned`. Requires the scope `jobs:write`.
    """
    queries.stop_trial(use.db, project_id=caller.project_id, sweep_id=sweep_id, number=number, is_client_retry=is_retry)
    return get_trial(sweep_id, number, use, caller)
