"""Vendored files match the published files, and our own files comply with the content security policy."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "dashboard"
VENDORS = (DASHBOARD / "vendor", Path(__file__).parent / "axe")
SCRIPTS = sorted((DASHBOARD / "js").rglob("*.js"))
IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["']([^"'\s]+)["']""")


@pytest.mark.parametrize("folder", VENDORS, ids=lambda folder: folder.name)
def test_every_vendored_file_has_the_digest_of_its_manifest(folder: Path) -> None:
    for package in _manifest(folder):
        for file in package["files"]:
            content = (folder / file["path"]).read_bytes()

            assert hashlib.sha256(content).hexdigest() == file["sha256"], file["path"]


@pytest.mark.parametrize("folder", VENDORS, ids=lambda folder: folder.name)
def test_vendored_file_without_its_replacements_matches_upstream(folder: Path) -> None:
    for file in [file for package in _manifest(folder) for file in package["files"] if "replacements" in file]:
        content = (folder / file["path"]).read_text()
        for published, ours in file["replacements"]:
            content = content.replace(ours, published)

        assert hashlib.sha256(content.encode()).hexdigest() == file["upstream_sha256"]


@pytest.mark.parametrize("folder", VENDORS, ids=lambda folder: folder.name)
def test_nothing_is_vendored_without_source_license_and_digest(folder: Path) -> None:
    packages = _manifest(folder)
    named = {file["path"] for package in packages for file in package["files"]} | {"MANIFEST.json"}

    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert present == named
    for package in packages:
        assert package["license"]
        assert package["version"] in package["source"]
        assert any("LICENSE" in file["upstream_path"] for file in package["files"])


def test_every_import_is_a_relative_path_to_an_existing_file() -> None:
    for script in [*SCRIPTS, *(DASHBOARD / "vendor").glob("*.js")]:
        for target in IMPORT.findall(script.read_text()):
            assert target.startswith("."), f"{script.name} imports {target!r}, which a browser can't find"
            assert (script.parent / target).is_file(), f"{script.name} imports {target!r}"


def test_page_has_no_inline_code_and_loads_only_local_files() -> None:
    page = (DASHBOARD / "index.html").read_text()

    assert re.search(r"<style|\sstyle=|\son\w+=|javascript:", page) is None
    assert all(body == "" for body in re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL))
    for address in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert (DASHBOARD / address).is_file(), address


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_script_turns_text_into_markup_or_code(script: Path) -> None:
    text = script.read_text()

    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "style=$"):
        assert word not in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_begin_with_a_comment_and_are_short(script: Path) -> None:
    lines = script.read_text().splitlines()

    assert lines[0].startswith("// ")
    assert len(lines) <= 200


def _manifest(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "MANIFEST.json").read_text())["packages"]
