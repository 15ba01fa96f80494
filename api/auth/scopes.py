"""The scopes of each operation, by operation id. The OpenAPI document shows them as `x-scopes`."""

from __future__ import annotations

from catalog.errors import Forbidden
from catalog.tenancy.authentication import Caller
from catalog.tenancy.scopes import OPERATORS, Scope

ANY_KEY: tuple[Scope, ...] = ()
NEEDED: dict[str, tuple[Scope, ...]] = {
    "list_files": ("files:read",),
    "get_file": ("files:read",),
    "get_file_content": ("files:read",),
    "get_file_report": ("files:read",),
    "upload_file": ("files:write",),
    "delete_file": ("files:write",),
    "create_upload": ("files:write",),
    "add_upload_part": ("files:write",),
    "complete_upload": ("files:write",),
    "cancel_upload": ("files:write",),
    "list_jobs": ("jobs:read",),
    "get_job": ("jobs:read",),
    "list_job_events": ("jobs:read",),
    "list_job_logs": ("jobs:read",),
    "list_job_checkpoints": ("jobs:read",),
    "get_job_metrics": ("jobs:read",),
    "explain_job": ("jobs:read",),
    "get_job_data_report": ("jobs:read",),
    "list_job_attempts": ("jobs:read",),
    "stream_job": ("jobs:read",),
    "get_queue": ("jobs:read",),
    "stream_queue": ("jobs:read",),
    "list_workers": ("jobs:read",),
    "cordon_worker": ("workers:write",),
    "uncordon_worker": ("workers:write",),
    "drain_worker": ("workers:write",),
    "create_plan": ("jobs:read", "jobs:write"),
    "list_plans": ("jobs:read",),
    "get_plan": ("jobs:read",),
    "delete_plan": ("jobs:write",),
    "create_job": ("jobs:write",),
    "cancel_job": ("jobs:write",),
    "pause_job": ("jobs:write",),
    "resume_job": ("jobs:write",),
    "list_sweeps": ("jobs:read",),
    "get_sweep": ("jobs:read",),
    "list_trials": ("jobs:read",),
    "get_trial": ("jobs:read",),
    "create_sweep": ("jobs:write",),
    "stop_trial": ("jobs:write",),
    "close_sweep": ("jobs:write",),
    "cancel_sweep": ("jobs:write",),
    "hold_job": ("jobs:write",),
    "release_job": ("jobs:write",),
    "move_job": ("jobs:write",),
    "list_models": ("adapters:read",),
    "get_model": ("adapters:read",),
    "list_adapters": ("adapters:read",),
    "get_adapter": ("adapters:read",),
    "list_adapter_files": ("adapters:read",),
    "get_adapter_file": ("adapters:read",),
    "get_adapter_archive": ("adapters:read",),
    "get_adapter_lineage": ("adapters:read",),
    "verify_adapter": ("adapters:read",),
    "reproduce_adapter": ("jobs:write",),
    "delete_adapter": ("adapters:write",),
    "list_adapter_exports": ("adapters:read",),
    "get_adapter_export": ("adapters:read",),
    "list_adapter_export_files": ("adapters:read",),
    "get_adapter_export_file": ("adapters:read",),
    "create_adapter_export": ("adapters:write",),
    "cancel_adapter_export": ("adapters:write",),
    "delete_adapter_export": ("adapters:write",),
    "list_model_permissions": ("permissions:read",),
    "create_model_permissions": ("permissions:write",),
    "delete_model_permission": ("permissions:write",),
    "create_chat_completion": ("models:answer",),
    "create_completion": ("models:answer",),
    "create_batch": ("models:answer",),
    "list_batches": ("models:answer",),
    "get_batch": ("models:answer",),
    "cancel_batch": ("models:answer",),
    "delete_model": ("adapters:write", "models:write"),
    "add_model": ("models:write",),
    "create_serving_endpoint": ("models:write",),
    "list_serving_endpoints": ("adapters:read",),
    "get_serving_endpoint": ("adapters:read",),
    "delete_serving_endpoint": ("models:write",),
    "report_serving_endpoint": ("models:write",),
    "list_endpoint_deployments": ("adapters:read",),
    "create_deployment": ("adapters:write",),
    "list_deployments": ("adapters:read",),
    "delete_deployment": ("adapters:write",),
    "list_api_keys": ("keys:read",),
    "get_api_key": ("keys:read",),
    "create_api_key": ("keys:write",),
    "revoke_api_key": ("keys:write",),
    "rotate_api_key": ("keys:write",),
    "limit_api_key": ("keys:write",),
    "list_audit_events": ("audit:read",),
    "export_audit_events": ("audit:read",),
    "verify_audit_events": ("audit:read",),
    "list_webhook_event_types": ("webhooks:read",),
    "list_webhook_endpoints": ("webhooks:read",),
    "get_webhook_endpoint": ("webhooks:read",),
    "list_webhook_deliveries": ("webhooks:read",),
    "get_webhook_delivery": ("webhooks:read",),
    "create_webhook_endpoint": ("webhooks:write",),
    "change_webhook_endpoint": ("webhooks:write",),
    "delete_webhook_endpoint": ("webhooks:write",),
    "rotate_webhook_secret": ("webhooks:write",),
    "test_webhook_endpoint": ("webhooks:write",),
    "replay_webhook_endpoint": ("webhooks:write",),
    "replay_webhook_delivery": ("webhooks:write",),
    "get_usage": ("usage:read",),
    "list_projects": ANY_KEY,
    "get_project": ANY_KEY,
    "get_project_limits": ANY_KEY,
    "limit_project": ("projects:write",),
    "create_project": ("projects:write",),
    "rename_project": ("projects:write",),
    "weigh_project": ("projects:write",),
    "archive_project": ("projects:write",),
    "restore_project": ("projects:write",),
    "list_organizations": ANY_KEY,
    "get_organization": ANY_KEY,
    "create_organization": ("organizations:write",),
    "rename_organization": ("organizations:write",),
    "create_sign_in_link": ANY_KEY,
    "get_browser_session": ANY_KEY,
    "delete_browser_session": ANY_KEY,
}
"""If an operation lists several scopes, one of them is sufficient to enter the route. The route then checks the scope
of the object in question."""


def check_operation(caller: Caller, operation_id: str | None) -> None:
    """Raises Forbidden. Every operation that requires a key must be in the table, even if it requires no scope."""
    assert operation_id in NEEDED, f"add the scopes of {operation_id} to api/auth/scopes.py"
    needed = NEEDED[operation_id]
    if needed and not caller.scopes.intersection(needed):
        raise _missing(needed, caller)


def require_scope(caller: Caller, scope: Scope) -> None:
    """Raises Forbidden."""
    if scope not in caller.scopes:
        raise _missing((scope,), caller)


def operator_required(caller: Caller) -> Forbidden:
    return Forbidden("operator_required", caller=caller.name)


def _missing(scopes: tuple[Scope, ...], caller: Caller) -> Forbidden:
    """Return the error for a key with none of the scopes."""
    scope, needed = scopes[0], " or ".join(scopes)
    if scope in OPERATORS and not caller.is_operator:
        return operator_required(caller)
    is_for_operators = scope in OPERATORS
    alone = is_for_operators or scope == "keys:write"
    return Forbidden(
        ("missing_operator_scope_of_browser" if is_for_operators else "missing_operator_scope")
        if alone
        else ("missing_scope_of_browser" if is_for_operators else "missing_scope"),
        caller=caller.name,
        needed=needed,
        project_name=caller.project_name,
        scope=scope,
    )
