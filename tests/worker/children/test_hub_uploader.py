"""The child that uploads an export to the Hub: files arrive, and each refusal of the Hub has a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.services.running import closed_port
from tests.services.uploads_hub import COMMIT, TOKEN, UploadHub, upload_hub

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 10, "Modelfile": b"FROM ./x.gguf\n"}


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with upload_hub() as hub:
        yield hub


def uploaded(tmp_path: Path, url: str, **environment: str) -> dict[str, Any]:
    """Run the child. Returns its result."""
    return result_of(tmp_path, url, environment, only_check=False)


def checked(tmp_path: Path, url: str) -> dict[str, Any]:
    """Run the child for its check alone. Returns its result."""
    return result_of(tmp_path, url, {}, only_check=True)


def result_of(tmp_path: Path, url: str, environment: dict[str, str], *, only_check: bool) -> dict[str, Any]:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    arguments, result = tmp_path / "arguments.json", tmp_path / "result.json"
    named = None if only_check else str(folder)
    request = {"folder": named, "repository": "org/support", "message": "Upload ft:x", "result": str(result)}
    arguments.write_text(json.dumps(request))
    given = {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    subprocess.run(
        [sys.executable, "-m", "worker.children.hub_uploader", str(arguments)],
        env=os.environ | given | environment,
        cwd=Path(__file__).parents[3],
        check=True,
        timeout=200,
    )
    return json.loads(result.read_text())


def test_folder_arrives_in_a_private_repository(hub: UploadHub, tmp_path: Path) -> None:
    result = uploaded(tmp_path, hub.url)

    assert result == {"url": f"{hub.url}/org/support/commit/{COMMIT}"}
    assert hub.repositories == {"org/support": FILES}
    assert hub.private == {"org/support": True}
    assert hub.messages == ["Upload ft:x"]


def test_check_creates_the_repository_and_uploads_nothing(hub: UploadHub, tmp_path: Path) -> None:
    assert checked(tmp_path, hub.url) == {"url": None}

    assert (hub.repositories, hub.private) == ({"org/support": {}}, {"org/support": True})


def test_check_finds_a_token_that_may_not_write(hub: UploadHub, tmp_path: Path) -> None:
    hub.repositories["org/support"] = {}
    hub.is_read_only = True

    assert checked(tmp_path, hub.url)["error"]["code"] == "hub_rejected"


def test_existing_repository_is_kept(hub: UploadHub, tmp_path: Path) -> None:
    hub.repositories["org/support"] = {"README.md": b"mine"}

    uploaded(tmp_path, hub.url)

    assert hub.repositories["org/support"] == {"README.md": b"mine", **FILES}


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (401, "hub_rejected", "Set HF_TOKEN on the worker"),
        (403, "hub_rejected", "Set HF_TOKEN on the worker"),
        (400, "hub_rejected", "Check the repository's name"),
        (500, "hub_unreachable", "HF_ENDPOINT"),
    ],
)
def test_refusal_of_the_hub_has_a_remedy(hub: UploadHub, tmp_path: Path, status: int, code: str, remedy: str) -> None:
    hub.refused_status = status

    error = uploaded(tmp_path, hub.url)["error"]

    assert error["code"] == code
    assert remedy in error["remedy"]
    assert TOKEN not in json.dumps(error)


@pytest.mark.parametrize(
    ("environment", "code"), [({"HF_TOKEN": ""}, "hub_rejected"), ({"HF_HUB_OFFLINE": "1"}, "hub_rejected")]
)
def test_worker_without_access_to_the_hub_says_so(
    hub: UploadHub, tmp_path: Path, environment: dict[str, str], code: str
) -> None:
    assert uploaded(tmp_path, hub.url, **environment)["error"]["code"] == code
    assert hub.repositories == {}


def test_hub_that_does_not_answer_is_unreachable(tmp_path: Path) -> None:
    with closed_port() as port:
        assert uploaded(tmp_path, f"http://127.0.0.1:{port}")["error"]["code"] == "hub_unreachable"
