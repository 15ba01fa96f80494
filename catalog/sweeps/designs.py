"""The design of a sweep that is on record."""

from __future__ import annotations

from dataclasses import replace

from catalog.sweeps.design import Design, designed
from catalog.sweeps.halving import Rungs
from catalog.sweeps.spec import SweepRequest
from catalog.tables import Sweep


def design_of(sweep: Sweep) -> Design:
    request = SweepRequest.model_validate(sweep.requested)
    return replace(designed(request, seed=sweep.seed), rungs=rungs_of(sweep))


def rungs_of(sweep: Sweep) -> Rungs | None:
    return None if sweep.rungs is None else Rungs(**sweep.rungs)
