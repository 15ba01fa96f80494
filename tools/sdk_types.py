"""The types of the SDK, from the OpenAPI document: responses in `lorry/models.py`, fields of jobs and sweeps in
`lorry/requests.py`. datamodel-code-generator writes the classes; here, the schemas are chosen, renamed and adapted.

Responses have a default for each field, so that a client works with an older service, and text instead of an enum, so
that it works with a newer one. Objects without a class of their own stay dictionaries.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from tools.json_schema import NULL, REFERENCE, Json, references
from tools.reference_api import meaning, openapi

RESPONSES = {
    "AdapterEfficiency": "Efficiency", "AdapterEvaluation": "Evaluation", "AdapterObject": "Adapter",
    "ApiKeyCreated": "ApiKey", "ApiKeyRevoked": "RevokedKey", "AttemptObject": "Attempt",
    "AuditEventObject": "AuditEvent", "AuditMisfit": "AuditMisfit", "AuditVerification": "AuditVerification",
    "BatchObject": "Batch", "CordonObject": "Cordon", "DeploymentObject": "Deployment", "ExportCost": "ExportCost",
    "ExportObject": "AdapterExport", "FileObject": "File", "FineTuningJob": "Job",
    "FineTuningJobCheckpoint": "Checkpoint", "FineTuningJobEvent": "JobEvent", "LogLine": "LogLine",
    "ModelError": "JobFailure", "ModelObject": "Model", "OrganizationObject": "Organization",
    "PermissionObject": "Permission", "PlanEstimate": "Estimate", "PlanObject": "Plan", "Progress": "Progress",
    "ProjectLimit": "ProjectLimit", "ProjectObject": "Project", "ReproductionObject": "Reproduction",
    "ServingEndpointObject": "ServingEndpoint", "SweepObject": "Sweep", "TrialObject": "Trial",
    "UsageBucket": "UsageBucket", "UsageResult": "UsageResult", "VerificationObject": "Verification",
    "WebhookDeliveryObject": "WebhookDelivery", "WebhookEndpointWithSecret": "WebhookEndpoint",
    "WebhookTestResult": "WebhookTest", "WorkerObject": "Worker",
}  # fmt: skip
"""The SDK's class of each schema of the API that has one."""
SAME = {"StoredError": "ModelError", "ExportError": "ModelError", "ExportVerification": "VerificationObject"}
"""Schemas whose fields are all in another one, which has a class."""
NEVER_NONE = {
    "Adapter.evaluation", "AdapterExport.verification", "Batch.errors", "Job.progress", "JobEvent.data", "Plan.data",
    "Plan.devices", "Plan.expected_start", "Plan.memory", "Plan.servable", "Plan.training_time", "Plan.warnings",
    "Progress.num_steps", "Trial.progress",
}  # fmt: skip
"""Null fields that are empty in the SDK: `job.progress.step` needs no check for None."""
SECRETS = ("value", "signing_secret")
"""Fields that `repr` must not show."""
FAILURE = "The error of a job, a plan, a sweep, an export or an import."
REQUESTS = {
    "DataOptions": "Data", "EvaluationRequest": "EvaluationRule", "JobRequest": "JobFields", "LoraRequest": "Lora",
    "OptimizerRequest": "Optimizer", "ResourcesRequest": "Resources", "ScheduleRequest": "Schedule",
}  # fmt: skip
"""The SDK's names of schemas that it names differently."""
ALIASES = {"KeepAdapters": "SweepRequest.keep_adapters", "Metric": "Objective.metric", "Priority": "JobFields.priority"}
"""Names for the types of fields that are also arguments of functions."""
ROOTS = ("JobFields", "Search", "Parameter", "Objective", *ALIASES)
ARGUMENTS = ("model", "training_file")
EMPTY: Mapping[str, Any] = {"string": "", "integer": 0, "number": 0.0, "boolean": False, "array": [], "object": {}}
COMMON = [
    "--input-file-type",
    "openapi",
    "--disable-timestamp",
    "--target-python-version",
    "3.11",
    "--formatters",
    "builtin",
]
COMMON += ["--use-schema-description", "--use-field-description", "--use-single-line-docstring", "--use-double-quotes"]


def models() -> str:
    """Return lorry/models.py."""
    schemas: dict[str, Json] = openapi()["components"]["schemas"]
    classes = {name: _response(name, schemas[api_name]) for api_name, name in sorted(RESPONSES.items())}
    classes["JobFailure"]["description"] = FAILURE
    finishing = dict.fromkeys(("Job", "Trial", "Sweep", "AdapterExport"), "lorry.view.Finishing")
    options = ["--output-model-type", "dataclasses.dataclass", "--use-default", "--strict-nullable"]
    options += ["--dataclass-arguments", '{"frozen": true, "kw_only": true}', "--base-class", "lorry.view.View"]
    options += ["--base-class-map", json.dumps(finishing)]
    text = _generate("Responses of the API", classes, options)
    text = re.sub(
        rf'^    ({"|".join(SECRETS)}): str = ""$', r'    \1: str = field(default="", repr=False)', text, flags=re.M
    )
    # pyright does not infer the type of the items.
    return re.sub(r": (.*) = field\(default_factory=(list|dict)\)", r": \1 = field(default_factory=\1)", text)


def requests() -> str:
    """Return lorry/requests.py."""
    schemas: dict[str, Json] = {}
    api: dict[str, Json] = openapi()["components"]["schemas"]
    for name, schema in api.items():
        schemas[REQUESTS.get(name, name)] = _request(schema)
    for alias, (name, _, field) in ((alias, path.partition(".")) for alias, path in ALIASES.items()):
        schemas[alias] = {**schemas[name]["properties"][field], "description": ""}
    schemas["JobFields"] = _job_fields(schemas)
    options = [
        "--output-model-type",
        "typing.TypedDict",
        "--use-total-false-for-typed-dict",
        "--no-use-closed-typed-dict",
    ]
    options += ["--enum-field-as-literal", "all"]
    return _generate("Fields of requests for jobs, plans and sweeps", _with_inner(schemas, ROOTS), options)


def _response(name: str, schema: Json) -> dict[str, Any]:
    fields = {**schema["properties"]}
    fields.pop("object", None)
    if name == "Trial":  # the API's schema does not name the type of its progress
        fields["progress"] = {"anyOf": [{"$ref": f"{REFERENCE}Progress"}, NULL]}
    properties = {key: _response_field(f"{name}.{key}", field) for key, field in fields.items()}
    text = schema["description"].replace(" null", " None")
    return {"type": "object", "description": text, "properties": properties}


def _response_field(path: str, schema: Json) -> dict[str, Any]:
    """Return the schema with a default, which is None if it may be null."""
    alternatives = [part for part in schema.get("anyOf", [schema]) if part != NULL]
    is_nullable = len(alternatives) < len(schema.get("anyOf", alternatives)) and path not in NEVER_NONE
    kind = _kind(alternatives[0]) if len(alternatives) == 1 else {}
    default = None if is_nullable else {} if "$ref" in kind else EMPTY.get(kind.get("type", ""))
    text = re.sub(r"\b[Nn]ull\b", "None" if is_nullable else "empty", _text(schema, openapi()))
    return {**({"anyOf": [kind, NULL]} if is_nullable else kind), "default": default, "description": text}


def _text(schema: Json, document: Json) -> str:
    """Return the description; for an object without one, the first paragraph of that of its schema."""
    return meaning(schema, document).partition("\n\n")[0]


def _kind(schema: Json) -> dict[str, Any]:
    """Return the type without limits, and a dictionary for an object without a class."""
    if "$ref" in schema:
        api_name: str = schema["$ref"].removeprefix(REFERENCE)
        name = RESPONSES.get(SAME.get(api_name, api_name))
        return {"$ref": f"{REFERENCE}{name}"} if name else {"type": "object", "additionalProperties": True}
    match schema:
        case {"type": "array", "items": items}:
            return {"type": "array", "items": _kind(items)}
        case {"type": "object", "additionalProperties": {"type": _} as values}:
            return {"type": "object", "additionalProperties": _kind(values)}
        case {"type": "object"}:
            return {"type": "object", "additionalProperties": True}
        case {"type": kind}:
            return {"type": kind}
        case _:
            return {}


def _request(schema: Any) -> Any:
    """Return the schema without limits and defaults, which the service checks and sets, and with the SDK's names."""
    match schema:
        case {"$ref": str(reference)}:
            name = reference.removeprefix(REFERENCE)
            return {**schema, "$ref": REFERENCE + REQUESTS.get(name, name)}
        case {"properties": properties}:
            kept = {key: schema[key] for key in ("type", "description", "required") if key in schema}
            return {**kept, "properties": {name: _request(field) for name, field in properties.items()}}
        case dict():
            kept = {"type", "anyOf", "items", "additionalProperties", "enum", "const"}
            text = (
                {"description": re.sub(r"\bnull\b", "None", schema["description"])} if "description" in schema else {}
            )
            return {key: _request(value) for key, value in schema.items() if key in kept} | text
        case list():
            return [_request(part) for part in schema]
        case _:
            return schema


def _job_fields(schemas: Mapping[str, Json]) -> dict[str, Any]:
    """Return the fields of a job that `jobs.create` accepts in addition to its model and file, each or None."""
    fields = {name: field for name, field in schemas["JobFields"]["properties"].items() if name not in ARGUMENTS}
    numbers = [{"$ref": REFERENCE + name} for name in schemas if name.endswith("Hyperparameters")]
    fields["method"] = schemas["Method"]["properties"]["type"]
    fields["hyperparameters"] = {
        "anyOf": [part for part in numbers if "Resolved" not in part["$ref"]],
        "description": 'Hyperparameters of the method; of "supervised" if no method is set.',
    }
    fields["extra_body"] = {
        "type": "object",
        "additionalProperties": True,
        "description": "Raw fields of the request body. They override the other fields.",
    }
    document = {"components": {"schemas": schemas}}
    nullable = {name: {"anyOf": [field, NULL], "description": _text(field, document)} for name, field in fields.items()}
    text = "Fields of a job other than its model and training file. None: the service's default."
    return {"type": "object", "description": text, "properties": nullable}


def _with_inner(schemas: Mapping[str, Json], names: Iterable[str]) -> dict[str, Json]:
    """Return these schemas, and all that they refer to."""
    found = {*names}
    while more := set(references([schemas[name] for name in found])) - found:
        found |= more
    return {name: schemas[name] for name in sorted(found)}


def _generate(title: str, schemas: Mapping[str, Json], options: list[str]) -> str:
    header = f'# Generated from the OpenAPI document by `make docs`; do not edit.\n"""{title}."""'
    document = {"openapi": "3.1.0", "info": {"title": title, "version": "1"}, "components": {"schemas": schemas}}
    command = [sys.executable, "-m", "datamodel_code_generator", *COMMON, "--custom-file-header", header, *options]
    written = subprocess.run(command, input=json.dumps(document), capture_output=True, text=True, check=True).stdout
    formatter = [sys.executable, "-m", "ruff", "format", "-"]
    return subprocess.run(formatter, input=written, capture_output=True, text=True, check=True).stdout
