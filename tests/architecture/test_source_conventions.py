"""Conventions of the sources: sizes, names, module docstrings, and constructs that shipped code avoids."""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Iterator

from tests.architecture.source_files import PACKAGES, ROOT, SourceFile, dotted, source_files
from tools.size import GENERATED

LONGEST_FILE = 600
LONGEST_FUNCTION = 60
FOLDERS = (*(name for name in PACKAGES if name != "migrations"), "tests", "qa", "tools", "benchmarks", "examples")
MOST_MODULES = 20
"""The maximum number of modules in one directory."""
LONGEST_OPENING = 10
"""The maximum number of lines of a module docstring, before an indented table or example."""
PRIVATE_NAMES = {
    "foretelling",
    "heard",
    "living",
    "moves",
    "taking",
    "pictures",
    "heads",
    "places",
    "turns",
    "giving_way",
    "mishaps",
    "echoes",
    "news",
    "pulse",
    "tether",
    "patience",
    "apart",
    "meeting",
    "lending",
    "leading",
    "booked",
    "passage",
    "shelf",
    "held",
    "between_parts",
    "cautions",
    "numbers",
}
"""Module names that stood for concepts with a standard name."""
VAGUE_NAMES = {"util", "utils", "common", "helpers", "helper", "manager", "base", "types", "misc"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "pickle.loads"}
SIGNS_MESSAGES = {
    "catalog/webhooks/signing.py",
    "catalog/audit/lineage_signatures.py",
    "catalog/storage/object_storage.py",
}
"""These modules sign webhook bodies, lineage records, and the one request that creates the bucket. No address that they
sign leaves the process."""
PRESIGNERS = {"sign", "sign_async", "presign", "generate_presigned_url", "generate_presigned_post"}
ARGUMENTS = {"trust_remote_code": True, "shell": True, "weights_only": False, "verify": False}


def test_files_are_at_most_600_lines() -> None:
    assert [source.name for source in _written_by_hand() if source.text.count("\n") > LONGEST_FILE] == []


def test_directories_have_at_most_20_modules() -> None:
    modules = [source.name for source in source_files(*FOLDERS) if not source.name.endswith("__init__.py")]
    folders = collections.Counter(name.rpartition("/")[0] for name in modules)

    assert [folder for folder, number in folders.items() if number > MOST_MODULES] == []


def test_module_names_are_not_vague() -> None:
    parts = {source.name: set(source.name.removesuffix(".py").split("/")) for source in source_files()}

    assert [name for name, words in parts.items() if words & (VAGUE_NAMES | PRIVATE_NAMES)] == []


def test_class_names_are_unique() -> None:
    """The client and the schemas of the API may have a class of the same name for the same thing."""
    places = collections.defaultdict[str, list[str]](list)
    for source in _written_by_hand():
        side = source.name.partition("/")[0] if source.name.startswith(("lorry/", "api/schemas/")) else "service"
        side = "schemas" if side == "api" else side
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[f"{side} {node.name}"].append(source.name)

    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_functions_are_at_most_60_lines_without_docstring() -> None:
    assert [place for source in _written_by_hand() for place in _long_functions(source)] == []


def test_modules_have_a_short_docstring() -> None:
    openings = {source.name: ast.get_docstring(source.tree) or "" for source in _written_by_hand() if source.tree.body}
    prose = {name: re.split(r"\n\n(?= )", opening)[0] for name, opening in openings.items()}

    assert [name for name, opening in prose.items() if not 0 < len(opening.splitlines()) <= LONGEST_OPENING] == []


def test_shipped_code_does_not_execute_data() -> None:
    assert [place for source in source_files() for place in _dangers(source)] == []


def test_no_presigned_urls_are_created() -> None:
    sources = (source for source in source_files() if source.name not in SIGNS_MESSAGES)

    assert [place for source in sources for place in _presigners(source)] == []


def test_dashboard_scripts_do_not_insert_text_as_markup() -> None:
    scripts = [path for path in (ROOT / "dashboard").rglob("*.js") if "vendor" not in path.parts]
    markup = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "dangerouslySetInnerHTML")

    assert scripts
    assert [path.name for path in scripts if any(word in path.read_text() for word in markup)] == []


def _written_by_hand() -> Iterator[SourceFile]:
    return (source for source in source_files() if "/versions/" not in source.name and source.name not in GENERATED)


def _long_functions(source: SourceFile) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_documented else 0
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring
            if num_lines > LONGEST_FUNCTION:
                yield f"{source.place(node)} {node.name}: {num_lines} lines"


def _dangers(source: SourceFile) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in UNPICKLERS for alias in node.names):
            yield source.place(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLERS:
            yield source.place(node)
        if isinstance(node, ast.Call):
            if dotted(node.func) in CALLS:
                yield source.place(node)
            yield from (f"{source.place(node)} {word.arg}" for word in node.keywords if _is_dangerous(word))


def _is_dangerous(keyword: ast.keyword) -> bool:
    return (
        keyword.arg in ARGUMENTS
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is ARGUMENTS[keyword.arg]
    )


def _presigners(source: SourceFile) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("obstore"):
            yield from (source.place(node) for alias in node.names if alias.name in PRESIGNERS)
        if isinstance(node, ast.Attribute) and node.attr in PRESIGNERS:
            yield source.place(node)
