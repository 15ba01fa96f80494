"""All error messages in the source code, as templates by error code."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_FOUND_REMEDY = "Check the id, and that the API key belongs to the project that owns the {}."
CODE = re.compile(r"[a-z]+(_[a-z0-9]+)+")
PACKAGES = ("catalog", "api", "worker", "lora_core", "lorry")


@dataclass(frozen=True, order=True)
class ErrorMessage:
    """One place that raises an error. `message` and `remedy` are templates: `{name}` stands for a value."""

    code: str
    message: str
    remedy: str
    path: str


def error_messages(root: Path = ROOT) -> list[ErrorMessage]:
    """Return one entry for each place that raises an error with a code, sorted by code and message."""
    found: set[ErrorMessage] = set()
    for package in PACKAGES:
        sources = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / package).rglob("*.py"))}
        fields = _codes_of_fields(sources.values())
        for path, tree in sources.items():
            module = _Module(tree, path.relative_to(root).as_posix(), fields)
            found.update(module.messages())
    return sorted(found)


def _codes_of_fields(trees: Iterable[ast.Module]) -> dict[str, set[str]]:
    """Return the texts that a package passes for each keyword, such as `too_large="part_too_large"`."""
    codes: dict[str, set[str]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant):
                text = node.value.value
                if isinstance(text, str) and CODE.fullmatch(text):
                    codes.setdefault(node.arg, set()).add(text)
    return codes


class _Module:
    """Finds the errors of one module. The value of a name is its last assignment above it in the function, or in the
    module."""

    def __init__(self, tree: ast.Module, path: str, fields: dict[str, set[str]]) -> None:
        self._tree = tree
        self._path = path
        self._fields = fields
        self._assigned: dict[str, list[tuple[int, ast.expr]]] = {}
        self._functions: list[range] = []
        self._defaults: dict[str, dict[str, ast.expr]] = {}
        for node in ast.walk(tree):
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                ) if isinstance(value, ast.Constant | ast.JoinedStr):
                    self._assigned.setdefault(name, []).append((node.lineno, value))
                case ast.FunctionDef(name=name, args=arguments) | ast.AsyncFunctionDef(name=name, args=arguments):
                    self._functions.append(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                    self._defaults[name] = {argument.arg: default for argument, default in named if default is not None}
                case _:
                    pass

    def messages(self) -> Iterator[ErrorMessage]:
        for node in ast.walk(self._tree):
            match node:
                case ast.Call():
                    yield from self._of_call(node)
                case ast.Tuple(elts=[ast.expr() as message, ast.expr() as remedy, ast.Constant(value=str(code))]):
                    if CODE.fullmatch(code) and " " in self._template(message):
                        yield ErrorMessage(code, self._template(message), self._template(remedy), self._path)
                case _:
                    pass

    def _of_call(self, call: ast.Call) -> Iterator[ErrorMessage]:
        name = ast.unparse(call.func).rpartition(".")[2]
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        keywords = self._defaults.get(name, {}) | given
        remedy = self._template(keywords["remedy"]) if "remedy" in keywords else ""
        match name, call.args:
            case "NotFound", [ast.Constant(value=str(noun)), _]:
                remedy = remedy or NOT_FOUND_REMEDY.format(noun)
                message = keywords.get("message")
                text = f"No {noun} with the id {{id}}." if message is None else self._template(message)
                yield self._entry(f"{noun.replace(' ', '_')}_not_found", text, remedy)
            case "NoLongerKept", [ast.Constant(value=str(noun)), _]:
                yield self._entry(f"{noun}_expired", f"The files for {noun} {{id}} have been deleted.", remedy)
            case "BadRow", [code, reason, fix]:
                for each in self._codes(code):
                    yield self._entry(each, f"Line {{number}}: {self._template(reason)}.", self._template(fix))
            case _:
                message = keywords.get("message") or (call.args[0] if call.args else None)
                if message is not None and "code" in keywords:
                    for each in self._codes(keywords["code"]):
                        yield self._entry(each, self._template(message), remedy)

    def _entry(self, code: str, message: str, remedy: str) -> ErrorMessage:
        return ErrorMessage(code, message, remedy, self._path)

    def _codes(self, node: ast.expr) -> Iterator[str]:
        match node:
            case ast.Constant(value=str(code)):
                yield code
            case ast.Name(id=name) if (value := self._value(name, node.lineno)) is not None:
                yield from self._codes(value)
            case ast.IfExp():
                yield from self._codes(node.body)
                yield from self._codes(node.orelse)
            case ast.Subscript(value=ast.Dict(values=values)):
                for value in values:
                    yield from self._codes(value)
            case ast.Attribute(attr=field) if field != "code":
                yield from sorted(self._fields.get(field, ()))
            case _:
                pass

    def _value(self, name: str, line: int) -> ast.expr | None:
        function = max((span for span in self._functions if line in span), key=lambda span: span.start, default=None)
        assigned = sorted(self._assigned.get(name, []), key=lambda each: each[0])
        before = [(number, value) for number, value in assigned if number <= line]
        inside = [value for number, value in before if function is not None and number in function]
        outside = [value for number, value in before if not any(number in span for span in self._functions)]
        return (inside or outside or [None])[-1]

    def _template(self, node: ast.expr) -> str:  # noqa: PLR0911
        match node:
            case ast.Constant(value=value):
                return str(value)
            case ast.Name(id=name) if (value := self._value(name, node.lineno)) is not None:
                return self._template(value)
            case ast.JoinedStr():
                return "".join(self._template(value) for value in node.values)
            case ast.FormattedValue(value=ast.Name(id=name)):
                return f"{{{name}}}" if self._value(name, node.lineno) is None else self._template(node.value)
            case ast.FormattedValue():
                return _placeholder(node.value)
            case ast.BinOp(op=ast.Add()):
                return self._template(node.left) + self._template(node.right)
            case ast.IfExp():
                return f"{self._template(node.body)} / {self._template(node.orelse)}"
            case _:
                return _placeholder(node)


def _placeholder(node: ast.expr) -> str:
    """Return the last name in an expression: `{adapter}` for `repr(self.adapter)`."""
    called = {id(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Name) and id(part) not in called]
    inner = {id(part.value) for part in parts if isinstance(part, ast.Attribute)}
    names = [part.attr if isinstance(part, ast.Attribute) else part.id for part in parts if id(part) not in inner]
    return f"{{{names[-1] if names else '…'}}}"
