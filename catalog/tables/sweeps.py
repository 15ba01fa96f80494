"""Sweeps, their trials, and what these had at the rungs."""

from __future__ import annotations

from sqlalchemy import Boolean, ForeignKey, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from catalog.tables.table import Json, Table

IS_DUE = text("due_at IS NOT NULL")


class Sweep(Table):
    """Several jobs that were asked for as one. Kept for ever, as its jobs are."""

    __tablename__ = "sweeps"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]
    created_by: Mapped[str]
    idempotency_key: Mapped[str | None]
    body_digest: Mapped[str]
    requested: Mapped[Json]
    """As it came."""
    seed: Mapped[int]
    num_trials: Mapped[int]
    """Of ask_tell: at most."""
    rungs: Mapped[Json | None]
    """min_steps, reduction_factor, max_rungs; None: no trial is stopped."""
    training_file: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    state: Mapped[str] = mapped_column(String(16))
    """A `spec.SweepState`."""
    num_created: Mapped[int]
    """Trials that there are: their numbers are from 0 to below this."""
    is_closed: Mapped[bool] = mapped_column(Boolean)
    """No further trial is made."""
    cancel_requested: Mapped[bool] = mapped_column(Boolean)
    due_at: Mapped[float | None]
    """From when on the controller has something to do with it; None: nothing before a trial of it has ended."""
    finished_at: Mapped[float | None]
    best_job: Mapped[str | None]
    """The trial whose adapter is the sweep's, once it is final."""
    error: Mapped[Json | None]
    """code and message: why no further trial could be made."""
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "project_id", "idempotency_key", unique=True),
        Index(None, "created_by", "created_at"),
        Index(None, "finished_at"),
        Index("ix_sweeps_due", "due_at", sqlite_where=IS_DUE, postgresql_where=IS_DUE),
    )


class Trial(Table):
    """A job of a sweep."""

    __tablename__ = "trials"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"))
    number: Mapped[int]
    parameters: Mapped[Json]
    score: Mapped[float]
    """Its value so far, with the sign that makes less better; infinite before there is one."""
    step: Mapped[int | None]
    """At which that was measured."""
    recent: Mapped[Json | None]
    """Of a metric of training: the last values, by step."""
    rung: Mapped[int | None]
    """The last to which it came."""
    stopped: Mapped[str | None] = mapped_column(Text)
    """The sentence why it was ended before its last step."""
    __table_args__ = (
        Index(None, "sweep_id", "number", unique=True),
        Index(None, "sweep_id", "score", "number"),
    )


class RungValue(Table):
    """What a trial had when it first came to a rung: what was decided then stands."""

    __tablename__ = "rung_values"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    rung: Mapped[int] = mapped_column(primary_key=True)
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"))
    score: Mapped[float]
    __table_args__ = (Index(None, "sweep_id", "rung", "score"),)
