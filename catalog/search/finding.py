"""The project's sweeps and trials, found within a transaction. What belongs to another project does not exist."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.errors import NotFound
from catalog.tables import Sweep, Trial


def find_sweep(session: Session, project_id: str, sweep_id: str, *, locked: bool = False) -> Sweep:
    """Raises NotFound. locked: no trial is made or added meanwhile; jobs are locked before it, never after."""
    mine = select(Sweep).where(Sweep.id == sweep_id, Sweep.project_id == project_id)
    sweep = session.scalar(mine.with_for_update(of=Sweep) if locked else mine)
    if sweep is None:
        raise NotFound("sweep", sweep_id)
    return sweep


def find_trial(session: Session, sweep: Sweep, number: int) -> Trial:
    """Raises NotFound."""
    mine = select(Trial).where(Trial.sweep_id == sweep.id, Trial.number == number)
    trial = session.scalar(mine) if 0 <= number < sweep.num_created else None
    if trial is None:
        raise NotFound("trial", str(number), remedy=f"The sweep has {sweep.num_created} trials, numbered from 0.")
    return trial
