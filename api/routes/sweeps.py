"""/v1/sweeps: several jobs that differ in stated fields; their leaderboard; what is done about them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body, Header, Path, Request
from fastapi.openapi.models import Example

from api.auth.authentication import Signed
from api.deps import After, IsRetry, Limit, Use
from api.requests.idempotency import identity_of
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.pagination import ListPage, page_of
from api.schemas.sweeps import SweepObject, TrialObject, TrialRequest, sweep_object, trial_object
from catalog.search.spec import MAX_TRIALS, SweepRequest
from catalog.sweeps import commands, controller, creation, queries

router = Router(prefix="/v1/sweeps", tags=["sweeps"], responses=SIGNED)
Number = Annotated[int, Path(ge=0, lt=MAX_TRIALS, description="Of the trial, from 0.")]
EXAMPLES: dict[str, Example] = {
    "asha": {
        "value": {
            "model": "smollm2-135m",
            "training_file": "file-3f2b8c9d0a1e4f5a6b7c8d9e",
            "validation_file": "file-4a3b8c9d0a1e4f5a6b7c8d9e",
            "parameters": {
                "optimizer.learning_rate": {"min": 1e-5, "max": 1e-3, "scale": "log"},
                "lora.rank": {"values": [4, 8, 16]},
            },
            "search": {"type": "asha", "trials": 20},
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
        Header(max_length=255, pattern=r"^[\x21-\x7e]+$", description="One per sweep: again is the same sweep."),
    ] = None,
    *,
    is_retry: IsRetry,
) -> SweepObject:
    """Each trial is a job of its own, of the body's fields and its parameters. All are checked before one is made. Each
    trial counts as a request of the key."""
    identity = identity_of(body, idempotency_key=idempotency_key, is_client_retry=is_retry)
    sweep = creation.made_before(use.db, caller=caller, **identity)
    is_new = sweep is None
    if sweep is None:
        sweep = creation.create(use.db, caller=caller, request=body, **identity)
    use.doorbell.ring()
    view = queries.get(use.db, project_id=caller.project_id, sweep_id=sweep.id)
    if is_new:
        request.state.headers |= use.limits.charge(caller, view.sweep.num_trials)
    return sweep_object(view)


@router.get("", operation_id="list_sweeps")
def list_sweeps(use: Use, caller: Signed, after: After = None, limit: Limit = 20) -> ListPage[SweepObject]:
    """Newest first."""
    page = queries.list_page(use.db, project_id=caller.project_id, after=after, limit=limit)
    return page_of([sweep_object(view) for view in page.items], has_more=page.has_more)


@router.get("/{sweep_id}", operation_id="get_sweep", responses=errors(404))
def get_sweep(sweep_id: str, use: Use, caller: Signed) -> SweepObject:
    return sweep_object(queries.get(use.db, project_id=caller.project_id, sweep_id=sweep_id))


@router.post("/{sweep_id}/cancel", operation_id="cancel_sweep", responses=errors(404, 409))
def cancel_sweep(sweep_id: str, use: Use, caller: Signed, is_retry: IsRetry) -> SweepObject:
    """No further trial is made, and those that have not ended are cancelled, within seconds. Adapters stay."""
    commands.cancel(use.db, project_id=caller.project_id, sweep_id=sweep_id, is_client_retry=is_retry)
    controller.advance(use.db, sweep_id)
    return get_sweep(sweep_id, use, caller)


@router.post("/{sweep_id}/close", operation_id="close_sweep", responses=errors(404))
def close_sweep(sweep_id: str, use: Use, caller: Signed) -> SweepObject:
    """No further trial is made or added; those that there are go on, and then the best is promoted."""
    commands.close(use.db, project_id=caller.project_id, sweep_id=sweep_id)
    controller.advance(use.db, sweep_id)
    return get_sweep(sweep_id, use, caller)


@router.get("/{sweep_id}/trials", operation_id="list_trials", responses=errors(404))
def list_trials(
    sweep_id: str, use: Use, caller: Signed, after: After = None, limit: Limit = 20
) -> ListPage[TrialObject]:
    """The leaderboard: the best first, those without a value last. Values of trials that run change between pages."""
    page = queries.leaderboard(use.db, project_id=caller.project_id, sweep_id=sweep_id, after=after, limit=limit)
    return page_of([trial_object(view) for view in page.items], has_more=page.has_more)


@router.post("/{sweep_id}/trials", operation_id="add_trial", responses=errors(404, 409))
def add_trial(body: TrialRequest, sweep_id: str, use: Use, caller: Signed, is_retry: IsRetry) -> TrialObject:
    """To an ask_tell sweep, with parameters of the client's own choice."""
    trial, job = creation.add_trial(
        use.db, caller=caller, sweep_id=sweep_id, parameters=body.parameters, is_client_retry=is_retry
    )
    use.doorbell.ring()
    return trial_object(queries.view_of(use.db, trial, job))


@router.get("/{sweep_id}/trials/{number}", operation_id="get_trial", responses=errors(404))
def get_trial(sweep_id: str, number: Number, use: Use, caller: Signed) -> TrialObject:
    return trial_object(queries.trial(use.db, project_id=caller.project_id, sweep_id=sweep_id, number=number))


@router.post("/{sweep_id}/trials/{number}/stop", operation_id="stop_trial", responses=errors(404, 409))
def stop_trial(sweep_id: str, number: Number, use: Use, caller: Signed, is_retry: IsRetry) -> TrialObject:
    """End a trial that does badly, before its last step. It leaves no adapter, and ends as cancelled: pruned."""
    trial, job = commands.stop_trial(
        use.db, project_id=caller.project_id, sweep_id=sweep_id, number=number, is_client_retry=is_retry
    )
    return trial_object(queries.view_of(use.db, trial, job))
