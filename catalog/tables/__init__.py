"""Every table. Times are seconds since 1970 by the database's clock; ids are text made by `new_id`.

Migrations under migrations/ must agree with these files: `alembic check` says so in CI.
"""

from catalog.tables.audit import AuditEvent, AuditHead, RetiredKey
from catalog.tables.exports import JobExport
from catalog.tables.fleet import Pulse, Service, Trainer, Worker
from catalog.tables.gangs import Gang, GangSeat
from catalog.tables.history import NOT_METRICS, Attempt, Checkpoint, JobEvent, JobOutput, MetricBlock
from catalog.tables.jobs import WITHOUT_METADATA, IdempotencyKey, Job, JobLabel
from catalog.tables.plans import FileOverlap, Plan
from catalog.tables.storage import Adapter, Artifact, BaseModelRow, File, Prepared
from catalog.tables.sweeps import RungValue, Sweep, Trial
from catalog.tables.table import Json, Table, new_id
from catalog.tables.tallies import Tally
from catalog.tables.tenancy import ApiKey, ModelPermission, Organization, Project, ProjectUsage, SignIn
from catalog.tables.uploads import Upload, UploadPart
from catalog.tables.usage import StoredBytes, StoredDay, UsageDay, UsageMonth
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint, WebhookTry

__all__ = [
    "NOT_METRICS",
    "WITHOUT_METADATA",
    "Adapter",
    "ApiKey",
    "Artifact",
    "Attempt",
    "AuditEvent",
    "AuditHead",
    "BaseModelRow",
    "Checkpoint",
    "File",
    "FileOverlap",
    "Gang",
    "GangSeat",
    "IdempotencyKey",
    "Job",
    "JobEvent",
    "JobExport",
    "JobLabel",
    "JobOutput",
    "Json",
    "MetricBlock",
    "ModelPermission",
    "Organization",
    "Plan",
    "Prepared",
    "Project",
    "ProjectUsage",
    "Pulse",
    "RetiredKey",
    "RungValue",
    "Service",
    "SignIn",
    "StoredBytes",
    "StoredDay",
    "Sweep",
    "Table",
    "Tally",
    "Trainer",
    "Trial",
    "Upload",
    "UploadPart",
    "UsageDay",
    "UsageMonth",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookTry",
    "Worker",
    "new_id",
]
