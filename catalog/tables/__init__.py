"""SQLAlchemy models of every table. Times are seconds since 1970 by the database's clock.

The imports register all tables, whichever of them a caller imports. `alembic check` compares them with migrations/.
"""

from catalog.tables import (
    audit,
    batches,
    exports,
    fleet,
    history,
    inference,
    jobs,
    plans,
    serving,
    storage,
    sweeps,
    tasks,
    tenancy,
    usage,
    webhooks,
)

__all__ = [
    "audit",
    "batches",
    "exports",
    "fleet",
    "history",
    "inference",
    "jobs",
    "plans",
    "serving",
    "storage",
    "sweeps",
    "tasks",
    "tenancy",
    "usage",
    "webhooks",
]
