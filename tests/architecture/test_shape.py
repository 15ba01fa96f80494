"""The shape of the sources: sizes, names, opening lines, and what shipped code never does."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from catalog import errors
from tests.architecture.source_files import ROOT, SourceFile, dotted, source_files

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
LONGEST_OPENING = 6
VAGUE_NAMES = {"util", "utils", "common", "helpers", "helper", "manager", "base", "types", "misc"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "pickle.loads"}
ARGUMENTS = {"trust_remote_code": True, "shell": True, "weights_only": False, "verify": False}
REFUSALS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.LorryError)
}

ALL = pytest.mark.parametrize("source", list(source_files()), ids=lambda source: source.name)


@ALL
def test_a_file_has_one_responsibility(source: SourceFile) -> None:
    assert source.text.count("\n") <= LONGEST_FILE
    assert not set(source.name.removesuffix(".py").split("/")) & VAGUE_NAMES


@ALL
def test_a_function_fits_on_a_screen(source: SourceFile) -> None:
    long = [
        f"{source.place(node)} {node.name}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
        and "/versions/" not in source.name
    ]

    assert long == []


@ALL
def test_a_module_opens_by_saying_what_lives_there(source: SourceFile) -> None:
    if source.tree.body:
        opening = ast.get_docstring(source.tree)
        assert opening
        assert opening.count("\n") < LONGEST_OPENING or "/versions/" in source.name


@ALL
def test_shipped_code_runs_nothing_that_came_as_data(source: SourceFile) -> None:
    assert list(_dangers(source)) == []


@pytest.mark.parametrize("source", list(source_files("api", "catalog", "worker")), ids=lambda source: source.name)
def test_every_refusal_has_a_remedy(source: SourceFile) -> None:
    assert list(_refusals_without_remedy(source)) == []


def test_the_dashboards_own_scripts_put_no_text_in_as_markup() -> None:
    scripts = [path for path in (ROOT / "dashboard").rglob("*.js") if "vendor" not in path.parts]
    markup = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "dangerouslySetInnerHTML")

    assert scripts
    assert [path.name for path in scripts if any(word in path.read_text() for word in markup)] == []


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


def _refusals_without_remedy(source: SourceFile) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or dotted(node.func).rpartition(".")[2] not in REFUSALS - {"NotFound"}:
            continue
        remedy = next((keyword.value for keyword in node.keywords if keyword.arg == "remedy"), None)
        splat = any(keyword.arg is None for keyword in node.keywords)
        empty = isinstance(remedy, ast.Constant) and not str(remedy.value or "").strip()
        if empty or (remedy is None and not splat):
            yield source.place(node)
