"""The design of a sweep that is on record."""

from __future__ import annotations

from dataclasses import replace

from pydantic import ValidationError

from catalog.errors import Conflict
from catalog.search.asha import Rungs
from catalog.search.design import Design, designed
from catalog.search.spec import SweepRequest
from catalog.tables import Sweep


def design_of(sweep: Sweep) -> Design:
    """Raises Conflict for one that an older version took and this one doesn't understand."""
    try:
        request = SweepRequest.model_validate(sweep.requested)
    except ValidationError as error:
        raise Conflict(
            f"The sweep {sweep.id} was made by an older version, and makes no further trials: {_first(error)}.",
            code="sweep_outdated",
            remedy="Make a new sweep for the trials that are missing.",
        ) from error
    return replace(designed(request, seed=sweep.seed), rungs=rungs_of(sweep))


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"


def rungs_of(sweep: Sweep) -> Rungs | None:
    return None if sweep.rungs is None else Rungs(**sweep.rungs)
