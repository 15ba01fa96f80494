"""Loaded by schemathesis: counts what was asked, and looks in each answer for what is the other project's.

What it needs to know is in the file that FUZZ_BRIEF names; what it counted goes to the file that the brief names.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import schemathesis
from hypothesis import strategies as st

BRIEF: dict[str, Any] = json.loads(Path(os.environ["FUZZ_BRIEF"]).read_text())
ID = re.compile(r"[a-z]+-[0-9a-f]{24}")
THEIR_IDS = frozenset(name for name in BRIEF["their_names"] if ID.fullmatch(name))
THEIR_WORDS = (*(name for name in BRIEF["their_names"] if name not in THEIR_IDS), BRIEF["their_mark"])
"""Names of adapters, which hold the mark, and then the mark alone."""
SHOWN_TO_OPERATORS = re.compile(r"/v1/(projects|api_keys|queue|audit)")
"""Where an operator sees every project, as documented."""
DEPENDS_ON_WHAT_IS_STORED = frozenset(
    {
        *("unknown_cursor", "part_not_found", "expires_in_the_past", "operator_scope", "file_too_large"),
        *("wrong_file_purpose", "wrong_file_kind", "loss_needs_chat", "split_needs_text", "empty_file"),
        *("model_not_ready", "model_import_failed", "invalid_metadata_filter"),
        *("validation_file_required", "conflicting_learning_rates", "learning_rate_required"),
        *("dora_on_quantised_base", "start_on_quantised_base", "quantisation_unavailable"),
        "integration_unavailable",
        *("invalid_webhook_url", "webhook_address_not_allowed"),  # what is allowed is the operator's to say
    }
)
"""Codes of refusals of what is well formed, but does not go with what there is, or with another field beside it. No
JSON schema says these: that they are sent is no failure of `positive_data_acceptance`, and of no other check."""
RULES_BETWEEN_FIELDS = frozenset(
    {
        *("optimizer", "schedule", "method", "lora", "method.dpo.hyperparameters", "search", None),
        *("integrations", *(f"integrations.{number}" for number in range(4))),
    }
)
"""Objects whose fields must go together: the same of the refusals of these."""
SENT: set[str] = set()
"""Names of the other project that this run gave to something of its own, such as a key that is called so."""
COUNTS: Counter[tuple[str, int]] = Counter()


class ForeignName(AssertionError):
    """An answer holds what belongs to the other project."""


@schemathesis.check
def nothing_of_the_other_project(_ctx: Any, response: Any, case: Any) -> None:
    """What the request itself held is told back in a refusal, and is no news."""
    if BRIEF["is_operator"] and SHOWN_TO_OPERATORS.match(case.operation.path):
        return
    asked = _asked(response.request) + unquote(str(dict(response.request.headers)))
    told = response.content.decode("utf-8", "replace") + str(dict(response.headers))
    found = [*THEIR_IDS.intersection(ID.findall(told)), *(word for word in THEIR_WORDS if word in told)]
    for name in found:
        if name not in asked and name not in SENT and name in told:
            raise ForeignName(f"{case.operation.label} shows {name}, which is another project's")
        told = told.replace(name, "")


@schemathesis.hook
def filter_failure(_context: Any, failure: Any, _case: Any, response: Any) -> bool:
    """Whether it is one."""
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code not in (400, 413):
        return True
    error = response.json()["error"]
    is_between_fields = error["code"] == "invalid_value" and error["param"] in RULES_BETWEEN_FIELDS
    names_a_field = (error["param"] or "").startswith("parameters.")  # of a sweep: a job's, by its path
    return not (is_between_fields or names_a_field or error["code"] in DEPENDS_ON_WHAT_IS_STORED)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """An upload is asked for with the parts that it has. And nobody saws off the branch that he sits on: the key that
    asks stays good, else nothing more is asked."""
    named = case.path_parameters or {}
    if case.operation.path.endswith("/complete") and case.meta is not None and case.meta.generation.mode.is_positive:
        case.body = {**case.body, "part_ids": BRIEF["parts"].get(named.get("upload_id"), case.body["part_ids"])}
    if case.method == "GET":
        return
    if named.get("api_key_id") == BRIEF["my_key"]:
        case.path_parameters = {**named, "api_key_id": BRIEF["another_key"]}
    if named.get("project") in BRIEF["my_project"] and case.operation.path.endswith("/archive"):
        case.path_parameters = {**named, "project": BRIEF["their_mark"]}


@schemathesis.hook
def after_call(_context: Any, case: Any, response: Any) -> None:
    COUNTS[case.operation.label, response.status_code] += 1
    if case.method != "GET" and response.status_code < 400:
        asked = _asked(response.request)
        SENT.update(name for name in (*THEIR_IDS, *THEIR_WORDS) if name in asked)


@atexit.register
def _report() -> None:
    told = [[label, status, number] for (label, status), number in COUNTS.items()]
    Path(BRIEF["counts"]).write_text(json.dumps(told))


def _asked(request: Any) -> str:
    body = request.body
    return unquote(str(request.url)) + (body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or ""))


def _rows() -> st.SearchStrategy[bytes]:
    """Data files: bytes that are no chats are refused, which no JSON schema can say."""
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=40)
    said = st.fixed_dictionaries({"role": st.just("assistant"), "content": text})
    asked = st.fixed_dictionaries({"role": st.just("user"), "content": text})
    row = st.tuples(asked, said).map(lambda pair: json.dumps({"messages": list(pair)}).encode() + b"\n")
    return st.lists(row, min_size=1, max_size=4).map(b"".join)


schemathesis.openapi.format("binary", _rows())
