"""Signed lineage records: signing by the service, verification by clients, and forgeries that digests miss."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from starlette.testclient import TestClient

from api.deps import Services
from catalog.audit import derived_keys, lineage_signatures
from catalog.pepper import Pepper
from catalog.tables.storage import Adapter
from lorry import LorryError
from lorry.verification.adapter_folder import verify_folder
from lorry.verification.signatures import read_keys


@pytest.fixture
def pulled(client: TestClient, adapter: Adapter, tmp_path: Path) -> Path:
    folder = tmp_path / "pulled"
    archive = client.get(f"/v1/adapters/{adapter.id}/archive").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def keys(anonymous: TestClient) -> list[Any]:
    """Return the public keys, read without an API key as the recipient of an adapter does."""
    return [*read_keys(anonymous.get("/v1/keys.json").content)]


def replace_weights(folder: Path) -> None:
    """Replace weights, manifest and record together, so that all digests still agree."""
    weights = b"\0" * 16
    (folder / "adapter_model.safetensors").write_bytes(weights)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for row in manifest["files"]:
        if row["path"] == "adapter_model.safetensors":
            row.update(digest=hashlib.sha256(weights).hexdigest(), num_bytes=len(weights))
    (folder / "manifest.json").write_bytes(rfc8785.dumps(manifest))
    signed = json.loads((folder / "lineage.json").read_bytes())
    signed["lineage"]["outputs"]["artifact"] = hashlib.sha256(rfc8785.dumps(manifest)).hexdigest()
    signed["lineage_id"] = hashlib.sha256(rfc8785.dumps(signed["lineage"])).hexdigest()
    (folder / "lineage.json").write_text(json.dumps(signed))


def change_signature(folder: Path, **fields: object) -> None:
    signed = json.loads((folder / "lineage.json").read_bytes())
    signed["signature"].update(fields)
    (folder / "lineage.json").write_text(json.dumps(signed))


def test_pulled_adapter_has_a_valid_signature(pulled: Path, keys: list[Any]) -> None:
    result = verify_folder(pulled, keys=keys)

    assert result == {"object": "adapter.verification", "passed": True, "problems": [], "signature": "valid"}


def test_consistently_replaced_files_do_not_verify(pulled: Path, keys: list[Any]) -> None:
    replace_weights(pulled)

    assert verify_folder(pulled)["passed"], "the forgery is self-consistent"
    assert verify_folder(pulled, keys=keys)["problems"] == ["The signature in lineage.json belongs to another adapter."]


def test_signature_with_a_foreign_key_is_rejected(pulled: Path, keys: list[Any]) -> None:
    replace_weights(pulled)
    signed = json.loads((pulled / "lineage.json").read_bytes())
    forged = lineage_signatures.sign_lineage(
        lineage_id=signed["lineage_id"], artifact=signed["lineage"]["outputs"]["artifact"], pepper=b"x" * 32
    )
    change_signature(pulled, **forged)
    by_name = verify_folder(pulled, keys=keys)
    forged["signatures"][0]["keyid"] = keys[0]["kid"]
    change_signature(pulled, **forged)

    by_signature = verify_folder(pulled, keys=keys)
    assert by_name["problems"] == ["The signature in lineage.json was made with an unknown key."]
    assert (by_name["passed"], by_name["signature"]) == (False, "unknown_key")
    assert by_signature["problems"] == ["The signature in lineage.json was not made with the key that it names."]
    assert (by_signature["passed"], by_signature["signature"]) == (False, "invalid")


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": "@"},
        {"payload": base64.b64encode(b"[]").decode()},
        {"payload": 3},
        {"signatures": []},
        {"signatures": [{}]},
        {"signatures": None},
        {"payloadType": "text/plain"},
    ],
)
def test_malformed_signature_is_reported_as_invalid(pulled: Path, keys: list[Any], changes: dict[str, object]) -> None:
    change_signature(pulled, **changes)

    assert verify_folder(pulled, keys=keys)["signature"] == "invalid"


def test_missing_signature_is_a_problem_if_keys_are_given(pulled: Path, keys: list[Any]) -> None:
    signed = json.loads((pulled / "lineage.json").read_bytes())
    del signed["signature"]
    (pulled / "lineage.json").write_text(json.dumps(signed))

    assert verify_folder(pulled, keys=keys)["problems"] == ["lineage.json has no signature."]


def test_service_does_not_sign_a_record_that_differs_from_its_id(
    services: Services, client: TestClient, adapter: Adapter
) -> None:
    with services.db.write() as session:
        row = session.get_one(Adapter, adapter.id)
        row.lineage = {**row.lineage, "job": "ftjob-another"}

    assert client.get(f"/v1/adapters/{adapter.id}/lineage").json()["signature"] is None


def test_adapter_pulled_before_a_key_rotation_still_verifies(
    client: TestClient, services: Services, pulled: Path
) -> None:
    old, new = services.pepper.current, b"n" * 32
    derived_keys.retire(services.db, Pepper(current=new, previous=old))
    renewed = replace(services, pepper=Pepper(current=new))
    client.app.state.services = renewed  # pyright: ignore[reportAttributeAccessIssue,reportFunctionMemberAccess]

    served = client.get("/v1/keys.json")

    keys = served.json()["keys"]
    assert [key["retired_at"] is not None for key in keys] == [False, True]
    result = verify_folder(pulled, keys=read_keys(served.content))
    assert (result["problems"], result["signature"]) == ([], "valid")
    assert result["key_retired_at"] == keys[1]["retired_at"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "RSA"}]}', '{"keys": 3}'])
def test_invalid_key_set_is_rejected(text: str) -> None:
    with pytest.raises(LorryError, match="not a JSON Web Key Set"):
        read_keys(text)
