"""Schemas of trained adapters, their files, their lineage, and permissions of other projects to read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import AdapterId, AdapterName, BaseDigest, BaseName, CreatedAt, Deleted, JobId, LineageId, ObjectId
from api.schemas.job_history import Rewards
from catalog.registry import checkpoints, efficiency
from catalog.spec.model_fields import WITHOUT_NUL, Strict
from catalog.tables.storage import Adapter, Artifact
from catalog.tables.table import Json
from catalog.tables.tenancy import ModelPermission

ProjectName = Annotated[str, Field(min_length=1, max_length=128, json_schema_extra=WITHOUT_NUL)]


class VerificationObject(BaseModel):
    """Difference between PEFT's logits on the base model and those of training, measured when the adapter was exported.

    `worst_linear_error` is the largest difference in what an adapted linear layer adds, as a fraction of its tolerance.
    """

    model_config = ConfigDict(extra="allow")
    passed: bool | None = Field(default=None, description="Whether every difference is within its tolerance.")
    max_abs_diff: float | None = Field(default=None, description="Largest absolute difference, in logits.")
    tolerance: float | None = Field(default=None, description="Largest accepted `max_abs_diff`, in logits.")
    worst_linear: str | None = Field(
        default=None, description="Path of the adapted linear layer with the largest error."
    )
    worst_linear_error: float | None = Field(
        default=None, description="Error of that layer, as a fraction of its tolerance."
    )
    explanation: str | None = Field(default=None, description="The comparison, and the reason for the tolerance.")


class AdapterEvaluation(BaseModel):
    """Mean loss on the validation file, per trained token or per pair of answers. Pairs have no perplexity.

    The base model's or the parent adapter's values, with which the job started, are given for comparison.
    """

    model_config = ConfigDict(extra="allow")
    base_loss: float | None = Field(
        default=None, description="Loss of the base model alone; null if the job continued an adapter."
    )
    parent_loss: float | None = Field(default=None, description="Loss of the parent adapter; null without a parent.")
    loss: float | None = Field(default=None, description="Loss of the trained adapter.")
    base_perplexity: float | None = Field(default=None, description="Perplexity of the base model: exp(`base_loss`).")
    parent_perplexity: float | None = Field(
        default=None, description="Perplexity of the parent adapter: exp(`parent_loss`)."
    )
    perplexity: float | None = Field(default=None, description="Perplexity of the trained adapter: exp(`loss`).")
    rewards: Rewards | None = Field(default=None, description="Rewards of a preference job on the validation file.")


class ParameterShare(BaseModel):
    """Trained parameters of the adapter, and parameters of the base model."""

    trainable: int = Field(description="Number of parameters of the adapter that were trained.")
    base: int = Field(description="Number of parameters of the base model.")
    share: float = Field(description="`trainable` / `base`.")


class SizeShare(BaseModel):
    """Size of the adapter's weights file, and of the base model's weight files. Null: the base's files are unknown."""

    bytes: int = Field(description="Size of the adapter's weights file, in bytes.")
    base_bytes: int | None = Field(description="Size of the base model's weight files, in bytes.")
    share: float | None = Field(description="`bytes` / `base_bytes`.")


class MemoryComponents(BaseModel):
    """Computed memory of training, in bytes."""

    weights: int = Field(description="Model weights as they are in training; for LoRA also the adapter's.")
    gradients: int = Field(description="Gradients of the trained parameters.")
    optimizer_state: int = Field(description="Moments and, in bfloat16, fp32 master weights.")
    activations: int = Field(description="Activations and logits of 1,024 tokens.")
    total: int = Field(description="Sum of the components, in bytes.")


class MeasuredMemory(BaseModel):
    """Memory that the trainer reported before the export, in bytes."""

    base_bytes: int = Field(description="Base model on the device, in bytes.")
    adapter_bytes: int = Field(description="State of all adapters that the trainer held, in bytes.")
    peak_bytes: int = Field(description="Peak of the device, or on a CPU of the process, in bytes.")


class TrainingMemory(BaseModel):
    """Memory of training the adapter, and of full fine-tuning with AdamW in the same precision.

    Full fine-tuning takes 16 bytes per parameter without activations (arXiv 1910.02054, section 3.1).
    """

    lora: MemoryComponents = Field(description="Memory of training the adapter.")
    full_fine_tuning: MemoryComponents = Field(description="Memory of training all parameters of the base model.")
    share: float = Field(description="Total of lora / total of full_fine_tuning.")
    measured: MeasuredMemory | None = Field(description="Null if the trainer did not report it.")


class InferenceLatency(BaseModel):
    """Duration of a pass of the merged model and of the base model, measured at an export."""

    base_seconds: float = Field(description="Duration of a pass of the base model, in seconds.")
    merged_seconds: float = Field(description="Duration of a pass of the merged model, in seconds.")
    ratio: float = Field(description="`merged_seconds` / `base_seconds`.")


class AdapterEfficiency(BaseModel):
    """The adapter compared with full fine-tuning of its base model (arXiv 2106.09685)."""

    parameters: ParameterShare
    size: SizeShare
    training_memory: TrainingMemory | None = Field(
        description="Null if the lineage record lacks the shapes of the base model."
    )
    inference_latency: InferenceLatency | None = Field(description="Null until an export measures it.")


class AdapterObject(BaseModel):
    """A trained adapter, or the adapter of a checkpoint."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "adapter-0a1b2c3d4e5f60718293a4b5",
                "object": "adapter",
                "name": "ft:smollm2-135m:default:docs:1c0ffee0",
                "created_at": 1790000200,
                "job_id": "ftjob-1c0ffee0a1b2c3d4e5f60718",
                "owned_by": "proj-5e1f0a",
                "checkpoint_step": None,
                "base_model": "smollm2-135m",
                "rank": 16,
                "precision": "bfloat16",
                "quantization": "none",
                "bytes": 9776128,
                "num_parameters": 4884480,
                "verification": {"passed": True, "max_abs_diff": 0.0, "tolerance": 0.01},
                "evaluation": {"base_loss": 2.91, "loss": 1.87, "base_perplexity": 18.4, "perplexity": 6.5},
                "efficiency": {
                    "parameters": {"trainable": 4884480, "base": 134515008, "share": 0.0363},
                    "size": {"bytes": 9793440, "base_bytes": 269060552, "share": 0.0364},
                    "inference_latency": None,
                },
            }
        }
    )
    id: AdapterId
    object: Literal["adapter"] = "adapter"
    name: AdapterName
    created_at: CreatedAt
    job_id: JobId
    owned_by: str = Field(description="ID of the project that trained it. Shared adapters belong to another project.")
    checkpoint_step: int | None = Field(
        description="Optimizer step of a checkpoint; null for the final adapter of a job."
    )
    base_model: BaseName
    base_digest: BaseDigest
    parent: str | None = Field(description="Name of the adapter from which it continues.")
    artifact: str = Field(description="Digest of the manifest.")
    bytes: int = Field(description="Total size of the adapter's files, in bytes.")
    num_parameters: int = Field(description="Number of trained parameters.")
    rank: int | None = Field(description="LoRA rank; null if the adapter's configuration does not state it.")
    precision: Literal["bfloat16", "float32"] | None = Field(
        description="Dtype of the base model in training and verification. Null if the lineage record lacks it."
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        description="Quantization of the base model in training and verification. Use the same to serve the adapter."
    )
    lineage_id: LineageId
    verification: VerificationObject
    evaluation: AdapterEvaluation | None
    efficiency: AdapterEfficiency | None = Field(
        description="Parameters, size, training memory and latency compared with full fine-tuning. Null if the lineage "
        "record lacks the description of the base model."
    )


class ArtifactFile(BaseModel):
    """A file of an artifact."""

    path: str = Field(description="Path of the file within the artifact.")
    digest: str = Field(description="SHA-256 of the file's bytes.")
    num_bytes: int = Field(description="Size of the file, in bytes.")


class ArtifactFiles(BaseModel):
    """The manifest. `artifact` is the SHA-256 of the canonical JSON (RFC 8785) of `files` and `kind`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "list",
                "artifact": "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
                "kind": "adapter",
                "data": [{"path": "adapter_config.json", "digest": "9f86d081884c7d65…", "num_bytes": 812}],
                "has_more": False,
            }
        }
    )

    object: Literal["list"] = "list"
    artifact: str = Field(description="Digest of the manifest, which identifies all bytes of all files.")
    kind: str = Field(description="Kind of the artifact, such as `adapter`.")
    data: list[ArtifactFile] = Field(description="The files, sorted by path.")
    has_more: bool = Field(default=False, description="Always false: the list is complete.")


class DsseSignature(BaseModel):
    """A signature of a DSSE envelope."""

    keyid: str = Field(description="The `kid` of a key in `/v1/keys.json`.")
    sig: str = Field(description="Ed25519 signature in Base64.")


class DsseEnvelope(BaseModel):
    """A DSSE v1 envelope of an in-toto statement. Its subject is the manifest; its predicate contains `lineage_id`."""

    payloadType: Literal["application/vnd.in-toto+json"] = Field(description="Media type of the payload.")  # noqa: N815  (name in the DSSE specification) = Field(description="Media type of the payload.")
    payload: str = Field(description="JSON of the statement in Base64.")
    signatures: list[DsseSignature] = Field(description="Signatures of the payload, each with one key.")


class PublicKey(BaseModel):
    """An Ed25519 public key as a JSON Web Key (RFC 8037)."""

    kty: Literal["OKP"] = Field(description="Key type: octet key pair.")
    crv: Literal["Ed25519"] = Field(description="Name of the curve.")
    use: Literal["sig"] = Field(description="Purpose of the key: signatures.")
    alg: Literal["EdDSA"] = Field(description="Signature algorithm (RFC 8037).")
    kid: str = Field(description="ID of the key, to which `keyid` of a signature refers.")
    x: str = Field(description="The 32 bytes of the key in Base64url, without padding.")
    retired_at: float | None = Field(
        default=None,
        description="Unix seconds at which the server's pepper was replaced: no later record is signed with the "
        "key. Null: in use.",
    )


class PublicKeySet(BaseModel):
    """The keys with which this service signs lineage records: the current one, then previous ones."""

    keys: list[PublicKey] = Field(description="The public keys, the current one first.")


class LineageObject(BaseModel):
    """A lineage record. `lineage_id` is the SHA-256 of its RFC 8785 form; `graph.parents` contains such IDs."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "adapter.lineage",
                "adapter_id": "adapter-0a1b2c3d4e5f60718293a4b5",
                "lineage_id": "ef2d127de37b942baad06145e54b0c619a1f22327b2ebbcfbec78f5564afe39d",
                "lineage": {"format": "lorry.lineage/1", "job": "ftjob-1c0ffee0a1b2c3d4e5f60718"},
                "signature": {
                    "payloadType": "application/vnd.in-toto+json",
                    "payload": "eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEifQ==",
                    "signatures": [{"keyid": "9f86d081884c7d659a2feaa0c55ad015", "sig": "MEUCIQD…"}],
                },
                "children": ["ft:smollm2-135m:default:docs-2:2d1eaf00"],
            }
        }
    )

    object: Literal["adapter.lineage"] = "adapter.lineage"
    adapter_id: AdapterId
    lineage_id: LineageId
    lineage: dict[str, Any] = Field(
        description="The record: data, base model, configuration, code, machines and results of the training."
    )
    signature: DsseEnvelope | None = Field(
        description="Signature of `lineage_id` and of the manifest's digest with a key of `/v1/keys.json`. Null if the "
        "stored record does not match its ID or its files; `POST /v1/adapters/{adapter}/verify` lists the problems."
    )
    children: list[str] = Field(default=[], description="Names of the adapters that currently continue from it.")


class AdapterVerification(BaseModel):
    """Result of reading every stored byte and checking it against the record."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "adapter.verification",
                "adapter_id": "adapter-0a1b2c3d4e5f60718293a4b5",
                "passed": True,
                "problems": [],
                "verification": {"passed": True, "max_abs_diff": 0.0, "tolerance": 0.01},
            }
        }
    )

    object: Literal["adapter.verification"] = "adapter.verification"
    adapter_id: AdapterId
    passed: bool = Field(description="Whether all stored bytes match the record.")
    problems: list[str] = Field(description="Each mismatch, as a sentence. Empty if it passed.")
    verification: VerificationObject = Field(
        description="The comparison with PEFT, measured when the adapter was exported."
    )


class AdapterDeleted(BaseModel):
    """Confirmation that an adapter is deleted."""

    id: AdapterId
    object: Literal["adapter"] = "adapter"
    deleted: Deleted = True


def adapter_object(row: Adapter, *, num_bytes: int, rank: int | None, cost: Json | None = None) -> AdapterObject:
    resolved: dict[str, Any] = row.lineage.get("config", {}).get("resolved", {})
    return AdapterObject.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "created_at": int(row.created_at),
            "job_id": row.job_id,
            "owned_by": row.project_id,
            "checkpoint_step": checkpoints.step_of(row),
            "base_model": row.base_model,
            "base_digest": row.base_digest,
            "parent": resolved["parent"]["name"] if resolved.get("parent") else None,
            "artifact": row.artifact,
            "bytes": num_bytes,
            "num_parameters": row.num_parameters,
            "rank": rank,
            "precision": resolved.get("precision"),
            "quantization": resolved.get("quantization", "none"),
            "lineage_id": row.lineage_id,
            "verification": row.verification,
            "evaluation": row.evaluation,
            "efficiency": efficiency.of_adapter(row.lineage, cost=cost),
        }
    )


def files_object(row: Artifact) -> ArtifactFiles:
    return ArtifactFiles.model_validate({"artifact": row.digest, "kind": row.kind, "data": row.files})


class PermissionRequest(Strict):
    """Projects that may read the model. They must belong to the model's organization."""

    model_config = ConfigDict(json_schema_extra={"example": {"project_ids": ["proj-3f2b8c9d0a1e"]}})
    project_ids: Annotated[list[ProjectName], Field(min_length=1, max_length=100, description="Project IDs or names.")]


class PermissionObject(BaseModel):
    """The permission of one project."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "checkpoint.permission",
                "id": "cp-0a1b2c3d4e5f60718293a4b5",
                "created_at": 1790000300,
                "project_id": "proj-3f2b8c9d0a1e4f5a6b7c8d9e",
            }
        }
    )
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    id: ObjectId
    created_at: CreatedAt
    project_id: str = Field(description="Project that may read the model.")


class PermissionDeleted(BaseModel):
    """Confirmation that a permission is deleted."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"object": "checkpoint.permission", "id": "cp-0a1b2c3d4e5f60718293a4b5", "deleted": True}
        }
    )
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    id: ObjectId
    deleted: Deleted = True


def permission_object(row: ModelPermission) -> PermissionObject:
    return PermissionObject(id=row.id, created_at=int(row.created_at), project_id=row.project_id)
