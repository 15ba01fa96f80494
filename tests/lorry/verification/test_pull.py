"""Downloading an adapter: a complete and verified adapter, or nothing."""

from __future__ import annotations

import json
import re
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


def test_pulled_adapter_is_complete_and_verifies_offline(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, tar())
    progress: list[int] = []

    folder = client.adapters.pull(
        "a", tmp_path / "new" / "adapter", on_progress=lambda done, _total: progress.append(done)
    )

    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    result = {"object": "adapter.verification", "passed": True, "problems": [], "signature": "not_checked"}
    assert verify_folder(folder) == result
    assert progress == sorted(progress)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["adapter"]


def test_pulling_again_downloads_nothing_and_overwrites_nothing(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, tar())
    client.adapters.pull("a", tmp_path / "adapter")
    client.adapters.pull("a", tmp_path / "adapter")
    (tmp_path / "adapter" / BIG).write_bytes(b"mine")

    with pytest.raises(LorryError, match="already exists and is not an unchanged copy of adapter "):
        client.adapters.pull("a", tmp_path / "adapter")

    assert len(service.requests("GET", "/v1/adapters/a/archive")) == 1
    assert (tmp_path / "adapter" / BIG).read_bytes() == b"mine"


def test_pulling_again_adds_a_missing_signature(service: Script, client: Lorry, tmp_path: Path) -> None:
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


def test_existing_empty_directory_is_used(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, tar())
    (tmp_path / "adapter").mkdir()

    assert verify_folder(client.adapters.pull("a", tmp_path / "adapter"))["passed"]


BAD: dict[str, tuple[Any, str]] = {
    "a changed byte": (tar({**FILES, BIG: b"x" + FILES[BIG][1:]}), "digest"),
    "another length": (
        tar({**FILES, BIG: FILES[BIG] + b"x"}),
        r"has [\d,]+ bytes, but the manifest lists [\d,]+ bytes",
    ),
    "a path outside the directory": (tar({**FILES, "../x": b"x"}), "not listed in the manifest"),
    "an absolute path": (tar({**FILES, "/tmp/x": b"x"}), "not listed in the manifest"),
    "a non-canonical path": (tar({f"./{name}": content for name, content in FILES.items()}), "manifest"),
    "an extra file": (tar({**FILES, "setup.py": b"x"}), "not listed in the manifest"),
    "a symbolic link": (tar(FILES, link("evil", "/etc/passwd", tarfile.SYMTYPE)), "not a regular file"),
    "a link instead of a file": (
        tar({"sub/extra.txt": b""}, link(BIG, "/etc/passwd", tarfile.SYMTYPE)),
        "not a regular file",
    ),
    "a hard link": (tar(FILES, link("evil", BIG, tarfile.LNKTYPE)), "not a regular file"),
    "a device": (tar(FILES, link("evil", "", tarfile.CHRTYPE)), "not a regular file"),
    "a file twice": (tar(FILES, tarfile.TarInfo("sub/extra.txt")), "twice"),
    "a missing file": (tar({BIG: FILES[BIG]}), "archive for adapter .* does not contain "),
    "not a tar": (b"<html>" * 1000, "not a complete tar"),
    "half a tar": (tar()[:100_000], "not a complete tar"),
    "nothing": (b"", "not a complete tar"),
}


@pytest.mark.parametrize("name", BAD)
def test_archive_that_differs_from_the_manifest_leaves_nothing(
    service: Script, client: Lorry, tmp_path: Path, name: str
) -> None:
    archive, why = BAD[name]
    serve(service, archive)

    with pytest.raises(BadDownload, match=why) as refused:
        client.adapters.pull("a", tmp_path / "adapter")

    assert re.search(r"`lorry adapters verify \S+`", refused.value.remedy)
    assert list(tmp_path.iterdir()) == []


def test_oversized_member_does_not_fill_the_disk(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, tar({"manifest.json": b"x" * 2**24, **FILES}))

    with pytest.raises(BadDownload, match="that the files in its manifest can need"):
        client.adapters.pull("a", tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []


def test_truncated_download_leaves_nothing(service: Script, client: Lorry, tmp_path: Path) -> None:
    serve(service, Reply(body=tar()[:50_000], cut=True))

    with pytest.raises((ConnectionFailed, BadDownload)):
        client.adapters.pull("a", tmp_path / "adapter")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["../x", "/x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a\0b", "", "nul ", "x.", "manifest.json", "\u202e"],
)
def test_manifest_with_unsafe_paths_is_rejected(service: Script, client: Lorry, tmp_path: Path, path: str) -> None:
    serve(service, tar(), listing=manifest({path: b"x"}))

    reason = "a reserved file name" if path == "manifest.json" else "not a portable file path"
    with pytest.raises(BadDownload, match=f"service's manifest for adapter .*, which is {reason}") as refused:
        client.adapters.pull("a", tmp_path / "adapter")

    assert re.search("`lorry adapters verify (?!NAME)", refused.value.remedy)


def test_manifest_that_does_not_match_the_adapter_is_rejected(service: Script, client: Lorry, tmp_path: Path) -> None:
    other = manifest({"adapter_config.json": b"other"})
    serve(service, tar(), listing={**other, "artifact": digest_of(manifest()["data"])})

    with pytest.raises(BadDownload, match=r"manifest for adapter .* does not match the adapter's digest"):
        client.adapters.pull("a", tmp_path / "adapter")


def test_manifest_without_a_canonical_form_is_rejected(service: Script, client: Lorry, tmp_path: Path) -> None:
    listing = manifest()
    listing["data"][0]["num_bytes"] = 2**53
    serve(service, tar(), listing=listing)

    with pytest.raises(BadDownload, match=r"manifest for adapter .* does not match the adapter's digest"):
        client.adapters.pull("a", tmp_path / "adapter")


@pytest.fixture
def pulled(service: Script, client: Lorry, tmp_path: Path) -> Path:
    serve(service, tar())
    return client.adapters.pull("a", tmp_path / "adapter")


def test_tampering_with_a_pulled_adapter_is_detected(pulled: Path) -> None:
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
        "The lineage record does not match its ID.",
    ]


def test_manifest_changed_with_its_files_does_not_match_the_record(pulled: Path) -> None:
    import json

    listing = json.loads((pulled / "manifest.json").read_text())
    listing["files"] = [row for row in listing["files"] if row["path"] != "sub/extra.txt"]
    (pulled / "manifest.json").write_text(json.dumps(listing))
    (pulled / "sub/extra.txt").unlink()

    assert verify_folder(pulled)["problems"] == [
        "The lineage record belongs to other files: it does not contain the digest of their manifest."
    ]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"{}", b'{"files": [{}]}', b'{"files": 3}', b"\xff"])
def test_unreadable_records_are_a_problem_with_a_remedy(pulled: Path, content: bytes) -> None:
    (pulled / "manifest.json").write_bytes(content)
    result = verify_folder(pulled)
    assert not result["passed"]
    assert "Pull the adapter again" in result["problems"][0]

    (pulled / "lineage.json").write_bytes(content)
    assert not verify_folder(pulled)["passed"]


@pytest.mark.parametrize("value", ["NaN", "-Infinity", str(2**53), str(-(2**53)), r'"\ud800"', r'{"\ud800": 1}'])
def test_values_without_a_canonical_form_are_a_problem(pulled: Path, value: str) -> None:
    record = (pulled / "lineage.json").read_text()
    (pulled / "lineage.json").write_text(record.replace("1.25e-07", value))
    (problem,) = verify_folder(pulled)["problems"]
    assert problem.startswith("The lineage record has no canonical form: ")

    (pulled / "manifest.json").write_text(f'{{"files": [], "kind": {value}}}')
    (problem,) = verify_folder(pulled)["problems"]
    assert problem.startswith("manifest.json has no canonical form: ")


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deeply_nested_record_is_a_problem(pulled: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    (pulled / "lineage.json").write_text(f'{{"lineage_id": "x", "lineage": {{"outputs": {nested}}}}}')

    (problem,) = verify_folder(pulled)["problems"]

    assert re.search("nested too deeply|not valid JSON", problem)
