# Generated from the OpenAPI document by `make docs`; do not edit.
"""Responses of the API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorry.view import Finishing, View


@dataclass(frozen=True, kw_only=True)
class Efficiency(View):
    """The adapter compared with full fine-tuning of its base model (arXiv 2106.09685)."""

    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """Trained parameters of the adapter, and parameters of the base model."""
    size: dict[str, Any] = field(default_factory=dict[str, Any])
    """Size of the adapter's weights file, and of the base model's weight files. empty: the base's files are unknown."""
    training_memory: dict[str, Any] | None = None
    """None if the lineage record lacks the shapes of the base model."""
    inference_latency: dict[str, Any] | None = None
    """None until an export measures it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(View):
    """
    Mean loss on the validation file, per trained token or per pair of answers. Pairs have no perplexity.

    The base model's or the parent adapter's values, with which the job started, are given for comparison.
    """

    base_loss: float | None = None
    """Loss of the base model alone; None if the job continued an adapter."""
    parent_loss: float | None = None
    """Loss of the parent adapter; None without a parent."""
    loss: float | None = None
    """Loss of the trained adapter."""
    base_perplexity: float | None = None
    """Perplexity of the base model: exp(`base_loss`)."""
    parent_perplexity: float | None = None
    """Perplexity of the parent adapter: exp(`parent_loss`)."""
    perplexity: float | None = None
    """Perplexity of the trained adapter: exp(`loss`)."""
    rewards: dict[str, Any] | None = None
    """Rewards of a preference job on the validation file."""


@dataclass(frozen=True, kw_only=True)
class ApiKey(View):
    """A new API key with its secret."""

    id: str = ""
    """ID of the object."""
    name: str = ""
    """Display name of the API key."""
    redacted_value: str = ""
    """The first and last characters of the secret, to distinguish keys."""
    project_id: str = ""
    """ID of the owning project, `proj-…`."""
    status: str = ""
    """`active`: valid. `expired`: past `expires_at`. `revoked`: revoked by a user."""
    scopes: list[str] = field(default_factory=list[str])
    """Scopes of the key."""
    is_operator: bool = False
    """Whether the key may act beyond its project."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    created_by: str | None = None
    """ID of the key that created it. None: a command on the server itself."""
    expires_at: int | None = None
    """Expiry, in Unix seconds; None if the key does not expire."""
    last_used_at: int | None = None
    """Last use, in Unix seconds, accurate to the minute; None before."""
    revoked_at: int | None = None
    """Time of the revocation, in Unix seconds; None if it is not revoked."""
    replaced_by: str | None = None
    """ID of the key that replaced it. Both are valid until `expires_at`."""
    requests_per_minute: int | None = None
    """Requests per minute. None: the service's limit; 0: no limit."""
    jobs_per_day: int | None = None
    """Jobs that the key may create per day. None: the service's limit; 0: no limit."""
    highest_priority: str = ""
    """Highest priority of the key's jobs. The project's limit applies too."""
    value: str = field(default="", repr=False)
    """The secret. No other response contains it."""


@dataclass(frozen=True, kw_only=True)
class RevokedKey(View):
    """A revoked key, and the unfinished work of the revoked keys."""

    id: str = ""
    """ID of the object."""
    name: str = ""
    """Display name of the API key."""
    redacted_value: str = ""
    """The first and last characters of the secret, to distinguish keys."""
    project_id: str = ""
    """ID of the owning project, `proj-…`."""
    status: str = ""
    """`active`: valid. `expired`: past `expires_at`. `revoked`: revoked by a user."""
    scopes: list[str] = field(default_factory=list[str])
    """Scopes of the key."""
    is_operator: bool = False
    """Whether the key may act beyond its project."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    created_by: str | None = None
    """ID of the key that created it. None: a command on the server itself."""
    expires_at: int | None = None
    """Expiry, in Unix seconds; None if the key does not expire."""
    last_used_at: int | None = None
    """Last use, in Unix seconds, accurate to the minute; None before."""
    revoked_at: int | None = None
    """Time of the revocation, in Unix seconds; None if it is not revoked."""
    replaced_by: str | None = None
    """ID of the key that replaced it. Both are valid until `expires_at`."""
    requests_per_minute: int | None = None
    """Requests per minute. None: the service's limit; 0: no limit."""
    jobs_per_day: int | None = None
    """Jobs that the key may create per day. None: the service's limit; 0: no limit."""
    highest_priority: str = ""
    """Highest priority of the key's jobs. The project's limit applies too."""
    revoked_keys: list[str] = field(default_factory=list[str])
    """IDs of the key and, if requested, of its descendants."""
    valid_descendants: int = 0
    """Number of valid keys that the key created, directly or indirectly."""
    unfinished_jobs: int = 0
    """Unfinished jobs that the revoked keys created and whose cancellation is not requested."""
    unfinished_sweeps: int = 0
    """Unfinished sweeps that the revoked keys created and whose cancellation is not requested."""
    unfinished_batches: int = 0
    """Unfinished batches that the revoked keys created and whose cancellation is not requested."""
    unfinished_exports: int = 0
    """Unfinished exports that the revoked keys created."""


@dataclass(frozen=True, kw_only=True)
class Attempt(View):
    """An attempt: one claim of the job by a worker."""

    number: int = 0
    """Number of the attempt, from 1."""
    claim_id: str = ""
    """ID of the worker's claim of the job."""
    worker_id: str = ""
    """ID of the worker that claimed the job."""
    trainer_id: str = ""
    """ID of the trainer process that the worker chose."""
    started_at: int = 0
    """Time of the claim, in Unix seconds."""
    ended_at: int | None = None
    """End of the attempt, in Unix seconds; None while it runs."""
    reason: str | None = None
    """Reason of the end, such as `completed` or `cuda_oom`; None while it runs."""
    detail: str | None = None
    """Explanation of the reason; None if there is none."""
    resumed_from_step: int | None = None
    """Optimizer step from which the attempt continued; None if it started from the beginning."""
    packmates: list[str] = field(default_factory=list[str])
    """Jobs that trained in the same trainer during the attempt."""
    why: dict[str, Any] = field(default_factory=dict[str, Any])
    """Inputs of the scheduling decision."""


@dataclass(frozen=True, kw_only=True)
class AuditEvent(View):
    """One change. An event is immutable. `link`, `previous` and `digest` are None until it is sealed into the chain."""

    id: str = ""
    """ID of the object."""
    type: str = ""
    """Type of the change, such as `job.cancelled`."""
    effective_at: float = 0.0
    """Time of the change, in Unix seconds, with the fraction that the digest covers."""
    actor: dict[str, Any] = field(default_factory=dict[str, Any])
    """The API key, browser or server that made the change."""
    project_id: str | None = None
    """None for objects without a project, such as base models."""
    object_id: str | None = None
    """ID of the changed object."""
    request_id: str | None = None
    """Header `x-request-id` of the response."""
    address: str | None = None
    """Address of the client, or of a reverse proxy that is not trusted."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further facts about the change, which depend on its type."""
    link: int | None = None
    """Position in the chain, from 1."""
    previous: str | None = None
    """Digest of the previous event."""
    digest: str | None = None
    """HMAC-SHA256 of the RFC 8785 form of the other non-None fields, with a key of the server."""


@dataclass(frozen=True, kw_only=True)
class AuditMisfit(View):
    """The event at which the chain is broken."""

    link: int = 0
    """Position in the chain, from 1."""
    id: str | None = None
    """ID of the audit event; see `misfit` for missing events and anchors."""
    fault: str = ""
    """`changed`: it differs from the sealed event. `missing`: it is absent. `misplaced`: its position is wrong. `anchor_changed`: an anchor differs from the chain."""


@dataclass(frozen=True, kw_only=True)
class AuditVerification(View):
    """Result of verifying a part of the chain. While `has_more` is true, continue with `after` = `last_link`."""

    is_sound: bool = False
    """Whether no event of this part breaks the chain."""
    num_events: int = 0
    """Number of events with a correct digest."""
    last_link: int = 0
    """Link of the last event with a correct digest."""
    last_digest: str = ""
    """Digest of the event at `last_link`."""
    has_more: bool = False
    """Whether events after `last_link` are not verified yet."""
    misfit: AuditMisfit | None = None
    """The first event that does not fit. Its ID is None if the event is missing; for a wrong anchor, it is the anchor's name."""
    num_unsealed: int = 0
    """Recent events that are not sealed into the chain yet."""


@dataclass(frozen=True, kw_only=True)
class Batch(View):
    """A file of requests that are answered at low priority within 24 hours."""

    id: str = ""
    """ID of the object."""
    endpoint: str = ""
    """Path that answers the requests."""
    input_file_id: str = ""
    """ID of the file with the requests."""
    completion_window: str = ""
    """Time after which unfinished requests expire."""
    status: str = ""
    """Status of the batch, as in OpenAI's API."""
    output_file_id: str | None = None
    """File with the responses, once the batch has ended."""
    error_file_id: str | None = None
    """File with the errors of the requests without a response."""
    errors: dict[str, Any] = field(default_factory=dict[str, Any])
    """Why the batch failed: its invalid lines, or its damaged file."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    in_progress_at: int | None = None
    """Start of the requests, in Unix seconds; None before."""
    expires_at: int = 0
    """Time after which unfinished requests expire, in Unix seconds."""
    finalizing_at: int | None = None
    """Time at which the output files began to be written, in Unix seconds; None before."""
    completed_at: int | None = None
    """Time of the completion, in Unix seconds; None unless completed."""
    failed_at: int | None = None
    """Time of the failure, in Unix seconds; None unless failed."""
    expired_at: int | None = None
    """Time at which the batch ended as expired, in Unix seconds; None unless expired."""
    cancelling_at: int | None = None
    """Time of the request to cancel, in Unix seconds; None without one."""
    cancelled_at: int | None = None
    """Time at which the batch ended as cancelled, in Unix seconds; None unless cancelled."""
    request_counts: dict[str, Any] = field(default_factory=dict[str, Any])
    """Numbers of requests by outcome."""
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    """Tokens of the requests so far."""
    metadata: dict[str, str] | None = None
    """Labels of the batch; None without labels."""


@dataclass(frozen=True, kw_only=True)
class Cordon(View):
    """The cordon of a worker, which claims no new jobs."""

    by: str = ""
    """`service`: several jobs in a row failed on the worker."""
    reason: str | None = None
    """Text of the operator or the service; None if none was given."""
    at: float = 0.0
    """Time of the cordon, in Unix seconds, by the database's clock."""
    evidence: list[dict[str, Any]] | None = None
    """The failed attempts for which the service cordoned the worker. None except with an operator key."""


@dataclass(frozen=True, kw_only=True)
class Deployment(View):
    """An adapter on a serving endpoint."""

    id: str = ""
    """ID of the object."""
    adapter_id: str = ""
    """ID of the adapter, `adapter-…`."""
    adapter: str = ""
    """Name of the adapter, `ft:…`."""
    endpoint_id: str = ""
    """ID of the serving endpoint."""
    endpoint: str = ""
    """Name of the serving endpoint."""
    state: str = ""
    """pending: being loaded. ready: verified, and answers requests. failed: see last_error; it is tried again. removing: being unloaded."""
    last_error: str | None = None
    """Why it is not ready. Only operators see the server's own text, which may contain paths."""
    verification: dict[str, Any] | None = None
    """Comparison with the built-in engine's answer; None until it is verified."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    updated_at: int = 0
    """Time of the last change, in Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class ExportCost(View):
    """
    Fastest of several forward passes of the base model and of the merged model, on a CPU of the worker.

    `same_operations` is whether both run the same operations on tensors of the same shapes and dtypes.
    """

    base_seconds: float = 0.0
    """Duration of a pass of the base model, in seconds."""
    merged_seconds: float = 0.0
    """Duration of a pass of the merged model, in seconds."""
    num_tokens: int = 0
    """Number of tokens in a pass."""
    same_operations: bool = False
    """Whether both models run the same operations on tensors of the same shapes and dtypes."""


@dataclass(frozen=True, kw_only=True)
class File(View):
    """A file. The rows of a file with the purpose `fine-tune` were validated at upload."""

    id: str = ""
    """ID of the object."""
    bytes: int = 0
    """Size of the content, in bytes."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    filename: str = ""
    """Name of the file as uploaded."""
    purpose: str = ""
    """Use of the file: `fine-tune`, `batch`, `user_data`, or a kind of result file."""
    status: str = ""
    """Always `processed`: the rows are validated before the upload is answered."""
    expires_at: int | None = None
    """Unix seconds after which it is deleted, once no unfinished job uses it. None: it does not expire."""
    status_details: str | None = None
    """Always None: an invalid file is rejected at upload."""
    rows: int | None = None
    """Number of rows of a dataset; None for other purposes."""
    kind: str | None = None
    """Kind of its rows: chat, completion, text, preference, unpaired; None for other purposes."""
    digest: str = ""
    """SHA-256 of the content."""
    same_content_as: str | None = None
    """In an upload's response: an earlier file of the project with the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(View):
    """The state of a job after a step. A job resumes from its newest checkpoint."""

    id: str = ""
    """ID of the object."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    fine_tuned_model_checkpoint: str = ""
    """Name of the checkpoint's adapter, to use as a model."""
    fine_tuning_job_id: str = ""
    """ID of the job that saved it."""
    step_number: int = 0
    """Number of optimizer steps before the checkpoint."""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    """Metrics measured at the checkpoint's step."""
    available: bool = False
    """Whether it can be used as a model: the newest two of a job, until seven days after the job's end."""


@dataclass(frozen=True, kw_only=True)
class JobEvent(View):
    """A message about a job: a change of its state, a warning, or metrics."""

    id: str = ""
    """ID of the event; later events have greater numbers."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    level: str = ""
    """Importance of the event: information, warning or error."""
    message: str = ""
    """Sentence for users."""
    type: str = ""
    """`metrics`: `data` has the metrics of a step. `message`: any other event."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """Facts of the event for programs; empty if it has none."""


@dataclass(frozen=True, kw_only=True)
class LogLine(View):
    """A line that a trainer printed while it held the job. Secrets and names of other projects' jobs are removed."""

    id: str = ""
    """ID of the line: attempt, rank and number."""
    attempt: int = 0
    """Number of the job's attempt, from 1."""
    rank: int = 0
    """Rank of the trainer process; 0 if there is only one."""
    number: int = 0
    """Line number in the stored log of that process, from 1."""
    text: str = ""
    """The line as the trainer printed it, without its line break."""


@dataclass(frozen=True, kw_only=True)
class JobFailure(View):
    """The error of a job, a plan, a sweep, an export or an import."""

    code: str = ""
    """Stable name of the error or warning, for programs."""
    message: str = ""
    """The problem, as text for users."""
    param: str | None = None
    """Dotted path of the field that caused the problem; None if none did."""
    remedy: str = ""
    """How to fix the problem; may be empty."""
    doc_url: str = ""
    """Entry of the code in the error reference."""


@dataclass(frozen=True, kw_only=True)
class Model(View):
    """A model: OpenAI's four fields, then Lorry's."""

    id: str = ""
    """Name of the model, which requests use."""
    created: int = 0
    """Creation time, in Unix seconds."""
    owned_by: str = ""
    """`lorry` for base models, else the ID of the project that trained it."""
    kind: str = ""
    """`base`: a base model. `adapter`: the result of a job. `checkpoint`: an adapter of an earlier step."""
    state: str = ""
    """Import of a base model: in progress, done or failed. Adapters are always `ready`."""
    inference: str = ""
    """`loaded`: a worker or a serving endpoint answers requests to the model at once. `loadable`: a worker must load the base model first. `unavailable`: the base model is not ready or was replaced, or no worker accepts requests and no serving endpoint is ready for the model."""
    base: str | None = None
    """Base model of an adapter."""
    digest: str | None = None
    """Digest of the manifest; equal digests mean equal bytes."""
    description: dict[str, Any] | None = None
    """Architecture, parameters and shapes of a base model."""
    source: str | None = None
    """Source of a base model. Only operators see a path."""
    revision: str | None = None
    """Requested commit of a Hub model; None if none was requested."""
    local_path: str | None = None
    """Folder of a base model on the API server's machine. Only operators see it."""
    error: JobFailure | None = None
    """Why the import failed, or why its last attempt failed and another one follows. Only operators see details."""


@dataclass(frozen=True, kw_only=True)
class Organization(View):
    """An organization: a group of projects. Models can be shared only between projects of the same organization."""

    id: str = ""
    """ID of the object."""
    name: str = ""
    """Unique name, which an operator can change."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    created_by: str | None = None
    """ID of the key that created it. None: the service itself, or a command on the server."""


@dataclass(frozen=True, kw_only=True)
class Permission(View):
    """The permission of one project."""

    id: str = ""
    """ID of the object."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    project_id: str = ""
    """Project that may read the model."""


@dataclass(frozen=True, kw_only=True)
class Estimate(View):
    """An estimate and its basis. If there is no estimate, `basis` explains why."""

    seconds: float | None = None
    """The estimate, in seconds; None if there is none."""
    min_seconds: float | None = None
    """Shortest likely time, in seconds; None: there is no range."""
    max_seconds: float | None = None
    """Longest likely time, in seconds; None: there is no range."""
    basis_kind: str = ""
    """`measured`: with this base model. `scaled`: from another base model. `guess`: from the device's data sheet. `none`: no estimate."""
    basis: str = ""
    """Explanation of the estimate's basis."""
    tokens_per_second: float | None = None
    """Assumed rate, in tokens per second; None without one."""
    worker_id: str | None = None
    """ID of the worker that the estimate assumes; None without one."""


@dataclass(frozen=True, kw_only=True)
class Plan(View):
    """The dry run of a job."""

    id: str = ""
    """ID of the object."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    expires_at: int = 0
    """Time at which the plan is deleted, in Unix seconds."""
    status: str = ""
    """`computing`: a worker computes it. `ready`: the results are complete. `failed`: no job can train on these files."""
    model: str = ""
    """Name of the base model."""
    base_digest: str = ""
    """Digest of the base model's files; equal digests mean equal bytes."""
    training_file: str = ""
    """ID of a file with the purpose fine-tune."""
    validation_file: str | None = None
    """ID of another such file, for the validation loss. None: no evaluations."""
    requested: dict[str, Any] = field(default_factory=dict[str, Any])
    """The request as received."""
    configuration: dict[str, Any] = field(default_factory=dict[str, Any])
    """The resolved configuration of the job."""
    error: JobFailure | None = None
    """Reason why no job can train on these files."""
    computed_at: int | None = None
    """Time of the results below, in Unix seconds. All are None until the plan is ready."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """Rows and tokens of the files."""
    num_steps: int | None = None
    """Number of optimizer steps."""
    trainable_parameters: int | None = None
    """Number of adapter parameters to train."""
    adapted_layers: int | None = None
    """Number of linear layers with an adapter."""
    memory: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Memory needed on one device, for each kind of device."""
    devices: dict[str, Any] = field(default_factory=dict[str, Any])
    """GPU sizes and workers with enough memory."""
    training_time: Estimate = field(default_factory=lambda: Estimate())
    """Time from the claim to the adapter: load, training and verification."""
    expected_start: Estimate = field(default_factory=lambda: Estimate())
    """Seconds from `computed_at` to the start."""
    servable: dict[str, Any] = field(default_factory=dict[str, Any])
    """Whether the adapter can be used elsewhere."""
    warnings: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Likely problems of the job. Empty if there are none."""


@dataclass(frozen=True, kw_only=True)
class Progress(View):
    """Progress of the job. Times are estimates."""

    step: int = 0
    """Number of finished optimizer steps."""
    num_steps: int = 0
    """Number of optimizer steps of the whole job."""
    epoch: float | None = None
    """Passes over the training file so far, with a fraction."""
    loss: float | None = None
    """Training loss of the latest step."""
    tokens_per_second: float | None = None
    """Rate of training of this job, in tokens per second."""
    seconds_left: float | None = None
    """Estimated remaining seconds, as of `updated_at`."""
    updated_at: float | None = None
    """Time of these values, in Unix seconds, by the database's clock."""
    valid_loss: float | None = None
    """Validation loss of the latest evaluation; None before the first."""
    best_valid_loss: float | None = None
    """Lowest validation loss so far."""
    kept_step: int | None = None
    """Optimizer step of the exported weights; None before the end."""
    kept_valid_loss: float | None = None
    """Validation loss of the adapter, at `kept_step`; None before the end."""
    stopped_early: str | None = None
    """Reason why the job ended before its last step."""


@dataclass(frozen=True, kw_only=True)
class ProjectLimit(View):
    """A quota and its current usage."""

    name: str = ""
    """Name of the quota, with its unit."""
    limit: float | None = None
    """None: no limit."""
    used: float = 0.0
    """Current usage, in the unit of the quota."""
    resets_at: int | None = None
    """Time at which `used` resets, in Unix seconds. None: it falls over time, or never."""


@dataclass(frozen=True, kw_only=True)
class Project(View):
    """A project, the owner of files, jobs and adapters."""

    id: str = ""
    """ID of the object."""
    organization_id: str = ""
    """Organization of the project. It can't be changed."""
    name: str = ""
    """Unique name, which an operator can change."""
    status: str = ""
    """`archived`: the project's keys are not valid."""
    weight: float = 0.0
    """Fair-share weight relative to other projects with waiting jobs."""
    highest_priority: str = ""
    """Highest priority of the project's jobs."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    created_by: str | None = None
    """ID of the key that created it. None: a command on the server itself."""
    archived_at: int | None = None
    """Time at which it was archived, in Unix seconds; None while it is active."""


@dataclass(frozen=True, kw_only=True)
class Reproduction(View):
    """
    The adapter that a job trains again from its lineage record, and the comparison of the two.

    The fields after `expected` are None until the job has succeeded.
    """

    adapter: str = ""
    """ID of the adapter."""
    name: str = ""
    """Name of the adapter, `ft:…`."""
    lineage_id: str = ""
    """SHA-256 of the lineage record's canonical JSON (RFC 8785)."""
    expected: dict[str, Any] = field(default_factory=dict[str, Any])
    """The recorded digests."""
    reproduced: dict[str, Any] | None = None
    """The digests of the job's own adapter."""
    identical: bool | None = None
    """Whether the digests are equal."""
    differences: list[dict[str, Any]] | None = None
    """Conditions that differ between the two trainings."""
    machines: dict[str, Any] | None = None
    """Machines of the two trainings."""
    is_difference_expected: bool | None = None
    """Whether the adapter differs, and equal bits were not promised: a condition differs, or a determinism level is not `bitwise`."""
    message: str | None = None
    """The verdict in sentences."""


@dataclass(frozen=True, kw_only=True)
class ServingEndpoint(View):
    """A running inference server that loads adapters."""

    id: str = ""
    """ID of the object."""
    name: str = ""
    """Unique name of the endpoint."""
    kind: str = ""
    """Software of the server."""
    base_model: str = ""
    """Name of the base model."""
    base_digest: str = ""
    """Digest of the base model's files; equal digests mean equal bytes."""
    url: str | None = None
    """Shown only to operators."""
    adapter_folder: str | None = None
    """Shown only to operators."""
    has_api_key: bool = False
    """Whether requests to the server carry an API key."""
    max_rank: int = 0
    """Highest LoRA rank that the server loads."""
    state: str = ""
    """ready: answers requests. unreachable: does not respond any more. rejected: responds, but not as required. pending: has not responded yet, or is not verified yet. failed: the program that starts the server has reported that it can't."""
    last_error: str | None = None
    """Why it is not ready. Shown only to operators."""
    served_model: str | None = None
    """The server's name of the base model. Shown only to operators."""
    verification: dict[str, Any] | None = None
    """Comparison of the base model's answer with the built-in engine's; None before."""
    checked_at: int | None = None
    """Time of the last check, in Unix seconds; None before the first."""
    created_at: int = 0
    """Creation time, in Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class Trial(Finishing):
    """A trial of a sweep: one job with its values of the varied fields."""

    id: str = ""
    """ID of the trial's job."""
    sweep_id: str = ""
    """ID of the sweep to which it belongs."""
    number: int = 0
    """Number of the trial, from 0."""
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """Values of the varied job fields, by dotted path."""
    status: str = ""
    """Status of the job."""
    phase: str | None = None
    """Phase of the job while it runs."""
    reason: str | None = None
    """Reason why the job ended. `pruned`: the sweep or its client stopped it."""
    value: float | None = None
    """Last measured value of the objective; None before the first."""
    step: int | None = None
    """Optimizer step at which the value was measured."""
    rung: int | None = None
    """Last rung that the trial reached, from 0."""
    stopped: str | None = None
    """Reason why the trial was stopped before its last step."""
    progress: Progress = field(default_factory=lambda: Progress())
    """Progress of the job. Times are estimates."""
    fine_tuned_model: str | None = None
    """Name of the trained adapter; None until the job has succeeded."""


@dataclass(frozen=True, kw_only=True)
class UsageResult(View):
    """Usage of one day."""

    organization_id: str | None = None
    """None unless grouped by organization."""
    project_id: str | None = None
    """None unless grouped by project."""
    model: str | None = None
    """Base model; None unless grouped by model."""
    device_seconds: float = 0.0
    """Device time in seconds, split among the jobs that train on the device."""
    trained_tokens: int = 0
    """Trained tokens of the jobs that succeeded on the day."""
    num_jobs: dict[str, Any] = field(default_factory=dict[str, Any])
    """Jobs created and finished on the day."""
    completions: dict[str, Any] = field(default_factory=dict[str, Any])
    """Inference requests answered on the day."""
    stored_bytes: int | None = None
    """Bytes that the project stores, at the end of the day or now. None if grouped by model, and on future days."""


@dataclass(frozen=True, kw_only=True)
class Verification(View):
    """
    Difference between PEFT's logits on the base model and those of training, measured when the adapter was exported.

    `worst_linear_error` is the largest difference in what an adapted linear layer adds, as a fraction of its tolerance.
    """

    passed: bool | None = None
    """Whether every difference is within its tolerance."""
    max_abs_diff: float | None = None
    """Largest absolute difference, in logits."""
    tolerance: float | None = None
    """Largest accepted `max_abs_diff`, in logits."""
    worst_linear: str | None = None
    """Path of the adapted linear layer with the largest error."""
    worst_linear_error: float | None = None
    """Error of that layer, as a fraction of its tolerance."""
    explanation: str | None = None
    """The comparison, and the reason for the tolerance."""


@dataclass(frozen=True, kw_only=True)
class WebhookDelivery(View):
    """One event for one endpoint."""

    id: str = ""
    """ID of the object."""
    webhook_endpoint_id: str = ""
    """ID of the endpoint that receives the event."""
    event_id: str = ""
    """The `webhook-id` header, the same in every attempt."""
    event_type: str = ""
    """Type of the event that is sent."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """Object of the event: the ID of the job or the endpoint."""
    is_test: bool = False
    """Whether a test request caused it."""
    status: str = ""
    """`pending`: it will be sent or retried. `delivered`: the endpoint accepted it. `failed`: it is not retried."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    ended_at: int | None = None
    """Time of the success or the last failure, in Unix seconds; None while it is pending."""
    next_try_at: int | None = None
    """Time of the next attempt, in Unix seconds; None unless it is pending."""
    tries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Attempts, oldest first."""


@dataclass(frozen=True, kw_only=True)
class WebhookEndpoint(View):
    """An endpoint with its secret, which no later response contains."""

    id: str = ""
    """ID of the object."""
    name: str = ""
    """Display name of the endpoint."""
    url: str = ""
    """Host and last four characters. The whole URL is stored encrypted; only the response that creates the endpoint has it."""
    event_types: list[str] = field(default_factory=list[str])
    """Types of events that are sent to it."""
    signing_secret_hint: str = ""
    """The last characters of its secret, to distinguish secrets."""
    status: str = ""
    """Whether events are sent to it."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    updated_at: int = 0
    """Time of the last change, in Unix seconds."""
    old_secret_until: int | None = None
    """Unix seconds until which messages are also signed with the old secret; None if there is none."""
    failing_since: int | None = None
    """Unix seconds since which every attempt has failed. After five days the endpoint is disabled. None: none failed."""
    disabled_at: int | None = None
    """Time at which it was disabled, in Unix seconds; None while it is enabled."""
    disabled_reason: str | None = None
    """`by_request`, `gone` (it answered 410) or `failing`."""
    signing_secret: str = field(default="", repr=False)
    """The secret to pass to `client.webhooks.unwrap`."""


@dataclass(frozen=True, kw_only=True)
class WebhookTest(View):
    """The endpoint's answer to a test. If it does not answer, the request fails and the error explains the reason."""

    webhook_endpoint_id: str = ""
    """ID of the tested endpoint."""
    event_type: str = ""
    """Type of the sample event."""
    status_code: int = 0
    """HTTP status of the endpoint's answer."""
    success: bool = False
    """Whether the endpoint answered, with any `status_code`."""
    delivery_id: str = ""
    """ID of the delivery that records the test."""
    reply: str = ""
    """The first bytes of the response, escaped."""


@dataclass(frozen=True, kw_only=True)
class Worker(View):
    """A worker process. `host`, `pid` and `report` are None except with an operator key."""

    id: str = ""
    """ID of the worker process."""
    state: str = ""
    """`busy`: it trains at least one job. An idle worker may keep a base model loaded."""
    cordon: Cordon | None = None
    """Set if the worker is cordoned: it finishes the jobs it holds and claims no new ones."""
    host: str | None = None
    """Name of the machine."""
    pid: int | None = None
    """Process ID on that machine."""
    devices: list[Any] = field(default_factory=list[Any])
    """Devices of the worker, with kind, name and memory."""
    version: str = ""
    """Version of the worker's software."""
    protocol: int = 0
    """Version of its protocol; the service supports a range of versions."""
    memory_bytes: int = 0
    """Memory of the devices, in bytes."""
    started_at: int = 0
    """Start of the worker, in Unix seconds."""
    last_seen_at: int = 0
    """Last heartbeat, in Unix seconds."""
    ended_at: int | None = None
    """End of the worker, in Unix seconds; None until it stops."""
    resident_base: str | None = None
    """Digest of the loaded base model; None if the worker is lost or ended."""
    resident_base_names: list[str] = field(default_factory=list[str])
    """Names of the loaded base model."""
    trainer_id: str | None = None
    """ID of the trainer that has the base model loaded."""
    report: dict[str, Any] | None = None
    """Measurements of the worker: tokens per second, memory in use, software versions."""


@dataclass(frozen=True, kw_only=True)
class Adapter(View):
    """A trained adapter, or the adapter of a checkpoint."""

    id: str = ""
    """ID of the adapter, `adapter-…`."""
    name: str = ""
    """Name of the adapter, `ft:…`."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    job_id: str = ""
    """ID of the fine-tuning job."""
    owned_by: str = ""
    """ID of the project that trained it. Shared adapters belong to another project."""
    checkpoint_step: int | None = None
    """Optimizer step of a checkpoint; None for the final adapter of a job."""
    base_model: str = ""
    """Name of the base model."""
    base_digest: str = ""
    """Digest of the base model's files; equal digests mean equal bytes."""
    parent: str | None = None
    """Name of the adapter from which it continues."""
    artifact: str = ""
    """Digest of the manifest."""
    bytes: int = 0
    """Total size of the adapter's files, in bytes."""
    num_parameters: int = 0
    """Number of trained parameters."""
    rank: int | None = None
    """LoRA rank; None if the adapter's configuration does not state it."""
    precision: str | None = None
    """Dtype of the base model in training and verification. None if the lineage record lacks it."""
    quantization: str = ""
    """Quantization of the base model in training and verification. Use the same to serve the adapter."""
    lineage_id: str = ""
    """SHA-256 of the lineage record's canonical JSON (RFC 8785)."""
    verification: Verification = field(default_factory=lambda: Verification())
    """Difference between PEFT's logits on the base model and those of training, measured when the adapter was exported."""
    evaluation: Evaluation = field(default_factory=lambda: Evaluation())
    """Mean loss on the validation file, per trained token or per pair of answers. Pairs have no perplexity."""
    efficiency: Efficiency | None = None
    """Parameters, size, training memory and latency compared with full fine-tuning. None if the lineage record lacks the description of the base model."""


@dataclass(frozen=True, kw_only=True)
class AdapterExport(Finishing):
    """An export of an adapter in another format, or to the Hugging Face Hub."""

    id: str = ""
    """ID of the object."""
    adapter: str = ""
    """ID of the adapter or checkpoint."""
    adapter_name: str = ""
    """Name of the adapter, `ft:…`."""
    format: str = ""
    """Format of the exported files."""
    quantization: str | None = None
    """Storage of the matrices in a GGUF file; None for other formats."""
    hub_repository: str | None = None
    """Repository on the Hugging Face Hub to upload to; None without one."""
    status: str = ""
    """Status of the export."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    started_at: int | None = None
    """Time at which a worker took it, in Unix seconds; None before."""
    finished_at: int | None = None
    """End of the export, in Unix seconds; None before."""
    error: JobFailure | None = None
    """Why it has failed. While it is queued: why a worker has not taken it."""
    artifact: str | None = None
    """Digest of the manifest of its files."""
    bytes: int = 0
    """Size of its files, in bytes; 0 until they are stored."""
    verification: Verification = field(default_factory=lambda: Verification())
    """Comparison of the exported files with the adapted model; empty until verified."""
    cost: ExportCost | None = None
    """Durations of a pass of the base model and the merged model; None unless measured."""
    hub_url: str | None = None
    """Address of the commit on the Hugging Face Hub."""


@dataclass(frozen=True, kw_only=True)
class Job(Finishing):
    """A fine-tuning job: OpenAI's fields, then Lorry's."""

    id: str = ""
    """ID of the fine-tuning job."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    started_at: int | None = None
    """First start of training, in Unix seconds; None before."""
    finished_at: int | None = None
    """Time at which the job reached a final status, in Unix seconds; None before."""
    estimated_finish: int | None = None
    """Estimated end, in Unix seconds; None unless the job is running and has an estimate."""
    status: str = ""
    """Status of the job; see the page on job states."""
    phase: str | None = None
    """Phase of a running job. `loading`: no trainer has received it yet. `verifying`: all steps are done, or the job stopped early, and PEFT verifies the adapter. None in other states."""
    reason: str | None = None
    """Reason why the last attempt ended."""
    model: str = ""
    """Name of the base model."""
    base_digest: str = ""
    """Digest of the base model's files; equal digests mean equal bytes."""
    sweep: dict[str, Any] | None = None
    """The sweep and trial; None if the job is not a trial."""
    parent_adapter: str | None = None
    """Name of the adapter from which the job continues."""
    reproduces: Reproduction | None = None
    """The adapter that the job trains again; None if it was not created by `reproduce`."""
    fine_tuned_model: str | None = None
    """Name of the trained adapter; None until the job has succeeded."""
    adapter_id: str | None = None
    """ID of the trained adapter; None until the job has succeeded."""
    organization_id: str = ""
    """Organization of the project."""
    result_files: list[str] = field(default_factory=list[str])
    """ID of a CSV file with the curves of a job that has succeeded. The file may have been deleted."""
    seed: int = 0
    """Seed of everything random in the job, given or drawn."""
    trained_tokens: int | None = None
    """Number of tokens in all training steps; None until the job has succeeded."""
    training_file: str = ""
    """ID of a file with the purpose fine-tune."""
    validation_file: str | None = None
    """ID of another such file, for the validation loss. None: no evaluations."""
    hyperparameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """OpenAI's three hyperparameters, resolved."""
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    """The training method and its hyperparameters, resolved."""
    suffix: str | None = None
    """Part of the adapter's name. Accents and other characters outside ASCII are removed. Characters other than letters, digits, `.`, `_` and `-` become `-`. None: none."""
    error: JobFailure | None = None
    """Reason of a failure; None unless the job has failed."""
    integrations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Trackers to which the job's metrics are written."""
    metadata: dict[str, str] | None = None
    """Labels of the job, as key-value pairs. None: none."""
    tags: list[str] = field(default_factory=list[str])
    """Tags for finding jobs, like metadata: GET /v1/fine_tuning/jobs?tag=NAME."""
    resources: dict[str, Any] = field(default_factory=dict[str, Any])
    """Devices of the job."""
    lora: dict[str, Any] = field(default_factory=dict[str, Any])
    """The adapter configuration, resolved."""
    optimizer: dict[str, Any] = field(default_factory=dict[str, Any])
    """The optimizer, resolved."""
    schedule: dict[str, Any] = field(default_factory=dict[str, Any])
    """The learning rate schedule."""
    evaluation: dict[str, Any] = field(default_factory=dict[str, Any])
    """The evaluations on the validation file."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """How the rows of the files are used."""
    early_stopping: dict[str, Any] | None = None
    """Conditions under which the job stops early; None: it trains all steps."""
    precision: str = ""
    """Precision of the base model: `bfloat16` or `float32`."""
    quantization: str = ""
    """Quantization of the base model's linear layers."""
    max_length: int = 0
    """Maximum number of tokens of a row."""
    max_steps: int | None = None
    """Maximum number of optimizer steps. None: all epochs."""
    checkpoint_every_steps: int = 0
    """Optimizer steps between checkpoints."""
    requested: dict[str, Any] = field(default_factory=dict[str, Any])
    """The request as received. Omitted fields are absent."""
    priority: str = ""
    """Priority class, up to the highest priority of the project and of the API key."""
    deadline: int | None = None
    """Time by which the job should finish, in Unix seconds. If it can't, an event reports it and the job continues."""
    is_held: bool = False
    """Whether the job stays in the queue and does not start until it is released."""
    seconds_running: float = 0.0
    """Time under a worker's claim, in seconds, over all attempts. Waiting and pauses do not count."""
    num_steps: int | None = None
    """Number of optimizer steps; None until the files are prepared."""
    progress: Progress = field(default_factory=lambda: Progress())
    """Progress of training; empty until it starts."""
    attempt: int = 0
    """Number of the current or last attempt; 0 before the first."""
    trainer_id: str | None = None
    """ID of the trainer process that has the job; None unless it is running."""
    worker_id: str | None = None
    """ID of the worker that has the job; None if none has it."""
    run_after: int | None = None
    """Time before which a retry does not start, in Unix seconds; None without a retry."""
    cancel_requested: bool = False
    """Whether a cancellation is requested. A running job stops at its next step."""
    pause_requested: bool = False
    """Whether a pause is requested. A running job first saves a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Finishing):
    """A group of jobs that differ in chosen fields, ranked by an objective."""

    id: str = ""
    """ID of the object."""
    created_at: int = 0
    """Creation time, in Unix seconds."""
    finished_at: int | None = None
    """Time at which the last trial ended, in Unix seconds; None before."""
    status: str = ""
    """`succeeded`: all trials have finished, and at least one has an adapter. `failed`: none has one."""
    model: str = ""
    """Name of the base model, or of the adapter to continue."""
    suffix: str | None = None
    """Part of the adapter's name. Accents and other characters outside ASCII are removed. Characters other than letters, digits, `.`, `_` and `-` become `-`. None: none."""
    training_file: str = ""
    """ID of a file with the purpose fine-tune."""
    validation_file: str | None = None
    """ID of another such file, for the validation loss. None: no evaluations."""
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """The varied fields by dotted path, each with its values or its range."""
    search: dict[str, Any] = field(default_factory=dict[str, Any])
    """The search method, with all settings resolved."""
    objective: dict[str, Any] = field(default_factory=dict[str, Any])
    """The metric by which trials are compared, resolved."""
    keep_adapters: str = ""
    """best: once all trials have finished, delete all adapters except the best one."""
    max_concurrent: int | None = None
    """Maximum number of unfinished trials at one time. None: 4 for tpe, else no limit."""
    num_trials: int = 0
    """Number of trials to create."""
    num_created: int = 0
    """Number of trials created so far."""
    counts: dict[str, int] = field(default_factory=dict[str, int])
    """Number of created trials by status."""
    is_closed: bool = False
    """Whether no further trial is created."""
    cancel_requested: bool = False
    """Whether the cancellation of the sweep is requested."""
    best_trial: Trial | None = None
    """Best of the trials that have succeeded so far."""
    best_adapter: str | None = None
    """ID of the best trial's adapter, once the sweep has finished."""
    fine_tuned_model: str | None = None
    """Name of the best adapter. `/v1/adapters` also accepts the sweep's ID for it."""
    error: JobFailure | None = None
    """Problem that ended the sweep; None if there is none."""
    requested: dict[str, Any] = field(default_factory=dict[str, Any])
    """The request as received."""


@dataclass(frozen=True, kw_only=True)
class UsageBucket(View):
    """One day, in UTC."""

    start_time: int = 0
    """Start of the day, in Unix seconds."""
    end_time: int = 0
    """End of the day, in Unix seconds; it belongs to the next day."""
    results: list[UsageResult] = field(default_factory=list[UsageResult])
    """Empty if nothing was used."""
