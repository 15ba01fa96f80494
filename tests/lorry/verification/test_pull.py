"""Downloading an adapter: all of it and nothing else, or nothing."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lorry import BadDownload, Lorry, LorryError
from lorry.errors import ConnectionFailed
from lorry.verification.adapter_folder import verify_folder
from tests.lorry.adapter_fixture import FILES, digest_of, lineage, link, manifest, serve, tar
from tests.lorry.scripted_server import Reply, Script

BIG = "adapter_model.safetensors"


def test_a_pulled_folder_holds_every_file_and_verifies_without_the_service(
    service: Script, client: Lorry, tmp_path: Path
) -> None:
    serve(service, tar())
    told: list[int] = []

    folder = client.adapters.pull("a", tmp_path / "new" / "adapter", on_progress=lambda done, _total: told.append(done))

    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    result = {"object": "adapter.verification", "passed": True, "problems": [], "signature": "not_checked"}
    assert verify_folder(folder) == result
    assert told == sorted(told)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["adapter"]


def test_pulling_again_is_free_and_pulling_over_something_else_is_refused(
    service: Script, client: Lorry, tmp_path: Path
) -> None:
    serve(service, tar())
    client.adapters.pull("a", tmp_path / "adapter")
    client.adapters.pull("a", tmp_path / "adapter")
    (tmp_path / "adapter" / BIG).write_bytes(b"mine")

    with pytest.raises(LorryError, match="already exists and does not contain this adapter"):
        client.adapters.pull("a", tmp_path / "adapter")

    assert len(service.requests("GET", "/v1/adapters/a/archive")) == 1
    assert (tmp_path / "adapter" / BIG).read_bytes() == b"mine"


def test_pulling_again_writes_the_signature_that_an_earlier_pull_did_not_have(
    service: Script, client: Lorry, tmp_path: Path
) -> None:
    serve(service, tar())
    signed = lineage(manifest()["artifact"]) | {"signature": {"payload": "eA=="}}
    service.on("GET", "/v1/adapters/a/lineage", signed)
    folder = client.adapters.pull("a", tmp_path / "adapter")
    before = json.loads((folder / "lineage.json").read_text())

    client.adapters.pull("a", folder)

    assert "signature" not in before
    assert json.loads((folder / "lineage.json").read_text()) == signed
    assert verify_folder(folder)["passed"]
    assert len(service.requests("GET", "/v1/adapters/a/archive")) == 1


def test_an_empty_folder_that_is_there_is_used(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, tar())
    (tmp_path / "adapter").mkdir()

    assert verify_folder(client.adapters.pull("a", tmp_path / "adapter"))["passed"]


BAD: dict[str, tuple[Any, str]] = {
    "a changed byte": (tar({**FILES, BIG: b"x" + FILES[BIG][1:]}), "digest"),
    "another length": (tar({**FILES, BIG: FILES[BIG] + b"x"}), "bytes, but the manifest lists"),
    "a path that leaves": (tar({**FILES, "../x": b"x"}), "not in the manifest"),
    "an absolute path": (tar({**FILES, "/tmp/x": b"x"}), "not in the manifest"),
    "a path that only looks like one": (tar({f"./{name}": content for name, content in FILES.items()}), "manifest"),
    "an extra file": (tar({**FILES, "setup.py": b"x"}), "not in the manifest"),
    "a symbolic link": (tar(FILES, link("evil", "/etc/passwd", tarfile.SYMTYPE)), "not a plain file"),
    "a link in the place of a file": (
        tar({"sub/extra.txt": b""}, link(BIG, "/etc/passwd", tarfile.SYMTYPE)),
        "not a plain file",
    ),
    "a hard link": (tar(FILES, link("evil", BIG, tarfile.LNKTYPE)), "not a plain file"),
    "a device": (tar(FILES, link("evil", "", tarfile.CHRTYPE)), "not a plain file"),
    "a file twice": (tar(FILES, tarfile.TarInfo("sub/extra.txt")), "twice"),
    "a missing file": (tar({BIG: FILES[BIG]}), "lacks"),
    "no tar": (b"<html>" * 1000, "not a complete tar"),
    "half a tar": (tar()[:100_000], "not a complete tar"),
    "nothing": (b"", "not a complete tar"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_what_the_manifest_says_is_refused_and_leaves_nothing(
    service: Script, client: Lorry, tmp_path: Path, name: str
) -> None:
    archive, why = BAD[name]
    serve(service, archive)

    with pytest.raises(BadDownload, match=why):
        client.adapters.pull("a", tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []


def test_a_member_that_is_far_longer_than_the_manifest_fills_no_disk(
    service: Script, client: Lorry, tmp_path: Path
) -> None:
    serve(service, tar({"manifest.json": b"x" * 2**24, **FILES}))

    with pytest.raises(BadDownload, match="larger than its manifest"):
        client.adapters.pull("a", tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, Reply(body=tar()[:50_000], cut=True))

    with pytest.raises((ConnectionFailed, BadDownload)):
        client.adapters.pull("a", tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["../x", "/x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a\0b", "", "nul ", "x.", "manifest.json", "\u202e"],
)
def test_a_manifest_whose_paths_could_leave_the_folder_is_refused(
    service: Script, client: Lorry, tmp_path: Path, path: str
) -> None:
    serve(service, tar(), told=manifest({path: b"x"}))

    with pytest.raises(BadDownload, match="contains the invalid path") as refused:
        client.adapters.pull("a", tmp_path / "adapter")

    assert refused.value.remedy


def test_a_manifest_that_is_not_the_adapters_is_refused(service: Script, client: Lorry, tmp_path: Path) -> None:
    other = manifest({"adapter_config.json": b"other"})
    serve(service, tar(), told={**other, "artifact": digest_of(manifest()["data"])})

    with pytest.raises(BadDownload, match="does not match its digest"):
        client.adapters.pull("a", tmp_path / "adapter")


@pytest.fixture
def pulled(service: Script, client: Lorry, tmp_path: Path) -> Path:
    serve(service, tar())
    return client.adapters.pull("a", tmp_path / "adapter")


def test_every_kind_of_tampering_with_a_pulled_folder_is_seen(pulled: Path) -> None:
    import json

    (pulled / BIG).write_bytes(b"x" + FILES[BIG][1:])
    (pulled / "sub/extra.txt").unlink()
    (pulled / "more.py").write_text("x")
    record = json.loads((pulled / "lineage.json").read_text())
    record["lineage"]["results"]["loss"] = 0
    (pulled / "lineage.json").write_text(json.dumps(record))

    assert verify_folder(pulled)["problems"] == [
        f"{BIG} does not match its digest.",
        "sub/extra.txt is missing.",
        "more.py is not in the manifest.",
        "The lineage record does not match its id.",
    ]


def test_a_manifest_that_was_changed_with_its_files_is_not_the_one_of_the_record(pulled: Path) -> None:
    import json

    told = json.loads((pulled / "manifest.json").read_text())
    told["files"] = [row for row in told["files"] if row["path"] != "sub/extra.txt"]
    (pulled / "manifest.json").write_text(json.dumps(told))
    (pulled / "sub/extra.txt").unlink()

    assert verify_folder(pulled)["problems"] == [
        "The lineage record belongs to other files: it does not contain the digest of their manifest."
    ]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"{}", b'{"files": [{}]}', b'{"files": 3}', b"\xff"])
def test_a_folder_without_readable_records_is_a_problem_and_no_crash(pulled: Path, content: bytes) -> None:
    (pulled / "manifest.json").write_bytes(content)
    assert not verify_folder(pulled)["passed"]

    (pulled / "lineage.json").write_bytes(content)
    assert not verify_folder(pulled)["passed"]
