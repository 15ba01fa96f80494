"""Hooks for schemathesis: they count requests, and search each response for data of the other project.

FUZZ_BRIEF names a file with their input. The counts are written to the file that this input names.
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

from qa.fuzz.texts import is_any_text

BRIEF: dict[str, Any] = json.loads(Path(os.environ["FUZZ_BRIEF"]).read_text())
ID = re.compile(BRIEF["id_form"])
THEIR_IDS = frozenset[str](BRIEF["their_ids"])
THEIR_WORDS: tuple[str, ...] = tuple(BRIEF["their_words"])
"""Names that contain the mark, the longest first, and then the mark alone."""
SHOWN_TO_OPERATORS = re.compile(
    r"\w+ /v1/(organizations|projects|api_keys|queue|usage|audit|fine_tuning/checkpoints)|DELETE /v1/models/"
)
"""Operations in which an operator sees every project, as documented. They include the unfinished jobs that use a base
model."""
DEPENDS_ON_WHAT_IS_STORED = frozenset(
    {
        *("conflicting_value", "missing_required_parameter", "operator_required", "upload_not_found"),
        *("wrong_file_kind", "file_empty", "file_too_large", "not_ready", "import_failed"),
        *("quantization_unavailable", "integration_unavailable", "validation_is_training", "max_length_lowered"),
        *("differs_from_parent", "unknown_target_modules", "evaluations_too_late", "unsupported_export"),
        *("invalid_export", "not_servable", "not_reproducible"),
        "invalid_webhook_url",  # the operator sets the allowed addresses
    }
)
"""Error codes for valid requests that conflict with stored data or with another field. No JSON schema can express these
rules, so such a response is not a failure of `positive_data_acceptance`."""
RULES_BETWEEN_FIELDS = frozenset(
    {
        *("optimizer", "schedule", "method", "lora", "method.dpo.hyperparameters", "search", None),
        "start_time",  # before the end
        "top_logprobs",  # only with logprobs
        "lora.target_modules",  # a regular expression after `re:`
        "seed",  # of an answer: its limit is that of 64 bits, which a schema's numbers round
        *("integrations", *(f"integrations.{number}" for number in range(4))),
    }
)
"""Objects whose fields depend on each other, and texts whose content no schema describes. Their refusals are not
failures, either."""
WHOLE_FORMS = {"POST /v1/files": {b"purpose", b"file"}, "POST /v1/uploads/{upload_id}/parts": {b"data"}}
SENT: set[str] = set()
"""Names of the other project that this run has used for its own objects, for example as the name of a key."""
COUNTS: Counter[tuple[str, int]] = Counter()


class ForeignName(AssertionError):
    """A response contains data of the other project."""


@schemathesis.check
def nothing_of_the_other_project(_ctx: Any, response: Any, case: Any) -> None:
    """Raise ForeignName if a response contains data of the other project. A refusal may repeat the request's text."""
    if BRIEF["is_operator"] and SHOWN_TO_OPERATORS.match(case.operation.label):
        return
    asked = _asked(response.request) + unquote(str(dict(response.request.headers)))
    told = response.content.decode("utf-8", "replace") + str(dict(response.headers))
    found = [*THEIR_IDS.intersection(ID.findall(told)), *(word for word in THEIR_WORDS if word in told)]
    for name in found:
        if name not in asked and name not in SENT and name in told:
            raise ForeignName(f"{case.operation.label} shows {name}, which is another project's")
        told = told.replace(name, "")


@schemathesis.hook
def filter_failure(_context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Return whether a reported failure is a real one."""
    if type(failure).__name__ == "AcceptedNegativeData":
        if "violates `required`" in failure.message:
            return not _is_whole_form(case, response.request)
        return not is_any_text(failure.message, response.request.url)
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code not in (400, 413):
        return True
    error = response.json()["error"]
    is_between_fields = error["code"] == "invalid_value" and error["param"] in RULES_BETWEEN_FIELDS
    names_a_field = (error["param"] or "").startswith("parameters.")  # a job's field in a sweep, by its path
    return not (is_between_fields or names_a_field or error["code"] in DEPENDS_ON_WHAT_IS_STORED)


def _is_whole_form(case: Any, request: Any) -> bool:
    """Return whether a form that should lack a field was sent with every field, because links were filled in
    afterwards."""
    sent = set(re.findall(rb'form-data; name="(\w+)"', request.body if isinstance(request.body, bytes) else b""))
    return sent == WHOLE_FORMS.get(case.operation.label)


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """Make valid requests consistent where one field depends on another. Also prevent requests that would end the run:
    the key in use stays valid, and one adapter is kept."""
    named = case.path_parameters or {}
    if case.meta is not None and case.meta.generation.mode.is_positive:
        _make_fit(case, named)
    if case.method == "GET":
        return
    if named.get("api_key_id") == BRIEF["my_key"]:
        case.path_parameters = {**named, "api_key_id": BRIEF["another_key"]}
    if case.method == "DELETE" and not {unquote(str(name)) for name in named.values()}.isdisjoint(BRIEF["kept"]):
        case.path_parameters = dict.fromkeys(named, BRIEF["their_mark"])
    if named.get("project") in BRIEF["my_project"] and case.operation.path.endswith("/archive"):
        case.path_parameters = {**named, "project": BRIEF["their_mark"]}


def _make_fit(case: Any, named: dict[str, Any]) -> None:
    """Complete an upload with its own parts, use a permission with its own model, and create a planned job unchanged.
    Conversations are valid. Webhooks go only to the local receiver, and the dashboard signs in with a valid key."""
    if case.operation.path.endswith("/complete"):
        case.body = {"part_ids": BRIEF["parts"].get(named.get("upload_id"), case.body["part_ids"])}
    if named.get("permission_id") in BRIEF["shared"]:
        case.path_parameters = {**named, "fine_tuned_model": BRIEF["shared"][named["permission_id"]]}
    if case.operation.label == "POST /v1/chat/completions":
        rest = {name: value for name, value in case.body.items() if name != "tools"}
        case.body = {**rest, "messages": [{"role": "user", "content": "Who are you?"}]}
    if isinstance(case.body, dict) and (fitting := _ours(case.body)) != case.body:
        case.body = fitting
    if case.operation.label == "POST /v1/browser_session":
        case.body = {"api_key": BRIEF["my_secret"]}
        case.headers = {**(case.headers or {}), "X-Lorry-Csrf": "1", "Sec-Fetch-Site": "same-origin"}


def _ours(body: dict[str, Any]) -> dict[str, Any]:
    """Replace the names in the document's examples with names of the project. With a plan, other fields are removed."""
    named = {"plan": body["plan"]} if "plan" in body else body
    known: dict[str, str] = BRIEF["examples"]
    return {name: known.get(value, value) if isinstance(value, str) else value for name, value in named.items()}


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
    """Return a strategy for data files. Bytes that are not chats are refused, which no JSON schema can express."""
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)
    said = st.fixed_dictionaries({"role": st.just("assistant"), "content": text})
    asked = st.fixed_dictionaries({"role": st.just("user"), "content": text})
    row = st.tuples(asked, said).map(lambda pair: json.dumps({"messages": list(pair)}).encode() + b"\n")
    return st.lists(row, min_size=1, max_size=4).map(b"".join)


schemathesis.openapi.format("binary", _rows())
