"""Path parameters of the routes, each with its description."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

FileId = Annotated[str, Path(description="ID of the file, `file-…`.")]
UploadId = Annotated[str, Path(description="ID of the upload, `upload-…`.")]
PlanId = Annotated[str, Path(description="ID of the plan, `plan-…`.")]
JobId = Annotated[str, Path(description="ID of the job, `ftjob-…`.")]
SweepId = Annotated[str, Path(description="ID of the sweep, `sweep-…`.")]
BatchId = Annotated[str, Path(description="ID of the batch, `batch-…`.")]
WorkerId = Annotated[str, Path(description="ID of the worker process.")]
ApiKeyId = Annotated[str, Path(description="ID of the API key, `key-…`.")]
PermissionId = Annotated[str, Path(description="ID of the permission, `cp-…`.")]
ExportId = Annotated[str, Path(description="ID of the export, `export-…`.")]
WebhookEndpointId = Annotated[str, Path(description="ID of the endpoint, `webhook-…`.")]
WebhookDeliveryId = Annotated[str, Path(description="ID of the delivery, `delivery-…`.")]
Model = Annotated[str, Path(description="Name of a base model, an adapter or a checkpoint.")]
Adapter = Annotated[
    str, Path(description="ID or name of an adapter or checkpoint, or ID of a finished sweep for its best adapter.")
]
FineTunedModel = Annotated[str, Path(description="ID or name of an adapter or checkpoint.")]
Organization = Annotated[str, Path(description="ID or name of the organization.")]
Project = Annotated[str, Path(description="ID or name of the project.")]
ServingEndpoint = Annotated[str, Path(description="ID or name of the serving endpoint.")]
FilePath = Annotated[str, Path(description="Path of the file, from the list of files.")]
