"""SQLAlchemy models of every table. Times are seconds since 1970 by the database's clock.

The imports register all tables, whichever of them a caller imports. `alembic check` compares them with migrations/.
"""

from catalog.tables import fleet, history, jobs, serving, storage, tasks, tenancy, webhooks

__all__ = ["fleet", "history", "jobs", "serving", "storage", "tasks", "tenancy", "webhooks"]
