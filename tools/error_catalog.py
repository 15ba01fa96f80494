"""All error messages in the source code, as templates by error code."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_FOUND_REMEDY = "Check the id, and that the API key belongs to the project that owns the {}."
PACKAGES = ("catalog", "api", "worker", "lora_core", "lorry")


@dataclass(frozen=True, order=True)
class ErrorMessage:
    """One place that raises an error. `message` and `remedy` are templates: `{name}` stands for a value."""

    code: str
    message: str
    remedy: str
    path: str


def error_messages(root: Path = ROOT) -> list[ErrorMessage]:
    """Return one entry for each call that passes an error code, sorted by code and message."""
    found: set[ErrorMessage] = set()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = ast.parse(path.read_text(encoding="utf-8"))
            constants = _constants(module)
            for node in ast.walk(module):
                if isinstance(node, ast.Call):
                    found.update(_messages(node, constants, path.relative_to(root).as_posix()))
    return sorted(found)


def _messages(call: ast.Call, constants: dict[str, str], path: str) -> Iterator[ErrorMessage]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    name = ast.unparse(call.func).rpartition(".")[2]
    if name == "NotFound" and len(call.args) == 2 and isinstance(call.args[0], ast.Constant):
        noun = str(call.args[0].value)
        remedy = _template(keywords["remedy"], constants) if "remedy" in keywords else NOT_FOUND_REMEDY.format(noun)
        yield ErrorMessage(f"{noun.replace(' ', '_')}_not_found", f"No {noun} with the id {{id}}.", remedy, path)
    if name == "NoLongerKept" and call.args and isinstance(call.args[0], ast.Constant):
        noun = str(call.args[0].value)
        remedy = _template(keywords["remedy"], constants)
        yield ErrorMessage(f"{noun}_expired", f"The files of the {noun} {{id}} are no longer kept.", remedy, path)
    message = keywords.get("message") or (call.args[0] if call.args else None)
    if "code" not in keywords or message is None:
        return
    remedy = _template(keywords["remedy"], constants) if "remedy" in keywords else ""
    for code in _codes(keywords["code"], constants):
        yield ErrorMessage(code, _template(message, constants), remedy, path)


def _codes(node: ast.expr, constants: dict[str, str]) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(code)):
            yield code
        case ast.Name(id=name) if name in constants:
            yield constants[name]
        case ast.IfExp():
            yield from _codes(node.body, constants)
            yield from _codes(node.orelse, constants)
        case _:
            pass


def _template(node: ast.expr, constants: dict[str, str]) -> str:  # noqa: PLR0911
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.JoinedStr():
            return "".join(_template(value, constants) for value in node.values)
        case ast.FormattedValue():
            return (
                _template(node.value, constants) if isinstance(node.value, ast.Constant) else _placeholder(node.value)
            )
        case ast.BinOp(op=ast.Add()):
            return _template(node.left, constants) + _template(node.right, constants)
        case ast.IfExp():
            return f"{_template(node.body, constants)} / {_template(node.orelse, constants)}"
        case _:
            return _placeholder(node)


def _placeholder(node: ast.expr) -> str:
    """Return the last name in an expression: `{adapter}` for `repr(self.adapter)`."""
    names = [part.attr if isinstance(part, ast.Attribute) else part.id for part in _names(node)]
    return f"{{{names[-1] if names else '…'}}}"


def _names(node: ast.expr) -> list[ast.Attribute | ast.Name]:
    called = {id(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Name) and id(part) not in called]
    inner = {id(part.value) for part in parts if isinstance(part, ast.Attribute)}
    return [part for part in parts if id(part) not in inner]


def _constants(module: ast.Module) -> dict[str, str]:
    """Texts that the module assigns to a name at its top level."""
    texts: dict[str, str] = {}
    for statement in module.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text)))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text)))
            ):
                texts[name] = text
            case _:
                pass
    return texts
