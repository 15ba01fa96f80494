"""Typed objects for the API's responses."""

from lorry.models.accounts import (
    ApiKey,
    AuditEvent,
    AuditMisfit,
    AuditVerification,
    Organization,
    Project,
    ProjectLimit,
    RevokedKey,
    UsageBucket,
    UsageResult,
)
from lorry.models.exports import (
    AdapterExport,
    ExportCost,
)
from lorry.models.jobs import (
    Adapter,
    Attempt,
    Checkpoint,
    Cordon,
    Evaluation,
    File,
    Job,
    JobEvent,
    JobFailure,
    JobUpdate,
    LogLine,
    Model,
    Permission,
    Progress,
    Sample,
    Verification,
    View,
    Worker,
)
from lorry.models.plans import (
    Estimate,
    Plan,
)
from lorry.models.serving import (
    Deployment,
    ServingEndpoint,
)
from lorry.models.sweeps import (
    Sweep,
    Trial,
)
from lorry.models.webhooks import (
    WebhookDelivery,
    WebhookEndpoint,
    WebhookTest,
)

__all__ = [
    "Adapter",
    "AdapterExport",
    "ApiKey",
    "Attempt",
    "AuditEvent",
    "AuditMisfit",
    "AuditVerification",
    "Checkpoint",
    "Cordon",
    "Deployment",
    "Estimate",
    "Evaluation",
    "ExportCost",
    "File",
    "Job",
    "JobEvent",
    "JobFailure",
    "JobUpdate",
    "LogLine",
    "Model",
    "Organization",
    "Permission",
    "Plan",
    "Progress",
    "Project",
    "ProjectLimit",
    "RevokedKey",
    "Sample",
    "ServingEndpoint",
    "Sweep",
    "Trial",
    "UsageBucket",
    "UsageResult",
    "Verification",
    "View",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookTest",
    "Worker",
]
