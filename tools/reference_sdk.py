"""The generated sections of the Python SDK's reference page, from the source of `lorry`."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
RESOURCES = ROOT / "lorry" / "resources"
OBJECTS = ("models.py", "resources/follow.py", "resources/jobs.py")
"""Files with the classes that methods return."""
MAX_WIDTH = 100
"""Maximum length of a signature on one line."""


def resources() -> str:
    """One section for each attribute of `Lorry`, in the order of its constructor."""
    classes = {node.name: node for path in sorted(RESOURCES.glob("*.py")) for node in _classes(path)}
    parts: list[str] = []
    for attribute, name in _attributes():
        parts += [f"### lorry.{attribute}", ""]
        if (text := ast.get_docstring(classes[name])) is not None:
            parts += [_paragraphs(text), ""]
        for method in classes[name].body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                parts += _function(method, f"{attribute}.{method.name}", level=4)
    return "\n".join(parts).strip()


def _attributes() -> Iterator[tuple[str, str]]:
    """Yield (attribute, class) of each resource that the constructor of `Lorry` creates."""
    (client,) = [node for node in _classes(ROOT / "lorry" / "client.py") if node.name == "Lorry"]
    for node in ast.walk(client):
        match node:
            case ast.Assign(
                targets=[ast.Attribute(attr=attribute)],
                value=ast.Call(func=ast.Name(id=name), args=[ast.Attribute(attr="_transport")]),
            ):
                yield attribute, name
            case _:
                pass


def functions() -> str:
    """The public functions that are not methods of a resource."""
    named = (
        ("lorry/verification/adapter_folder.py", "verify_folder", "lorry.verification.adapter_folder.verify_folder"),
    )
    parts: list[str] = []
    for path, name, title in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        parts += _function(found, title, level=3)
    return "\n".join(parts).strip()


def objects() -> str:
    """A table of fields for each class that the methods return."""
    parts: list[str] = []
    for path in OBJECTS:
        for node in filter(_is_dataclass, _classes(ROOT / "lorry" / path)):
            parts += [f"### {node.name}", "", _paragraphs(ast.get_docstring(node) or ""), ""]
            fields = list(_fields(node))
            if fields:
                parts += ["| Field | Type | Meaning |", "|---|---|---|", *fields, ""]
    return "\n".join(parts).strip()


def errors() -> str:
    parts = ["| Exception | Base class | Raised when |", "|---|---|---|"]
    for node in _classes(ROOT / "lorry" / "errors.py"):
        base = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
        parts.append(f"| `{node.name}` | {base} | {_cell(ast.get_docstring(node) or '')} |")
    return "\n".join(parts)


def _classes(path: Path) -> Iterator[ast.ClassDef]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node


def _function(node: ast.FunctionDef, title: str, *, level: int) -> Iterator[str]:
    yield from ("#" * level + f" {title}", "", "```python", _signature(node), "```", "")
    if (text := ast.get_docstring(node)) is not None:
        yield from (_paragraphs(text), "")


def _signature(node: ast.FunctionDef) -> str:
    """Return the definition without `self`; one parameter per line if it is long."""
    returns = ast.unparse(node.returns) if node.returns is not None else "None"
    parameters = list(_parameters(node.args))
    line = f"def {node.name}({', '.join(parameters)}) -> {returns}: ..."
    if len(line) <= MAX_WIDTH:
        return line
    return "\n".join([f"def {node.name}(", *(f"    {text}," for text in parameters), f") -> {returns}: ..."])


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [argument for argument in arguments.args if argument.arg != "self"]
    first = len(positional) - len(arguments.defaults)
    for index, argument in enumerate(positional):
        yield _parameter(argument, arguments.defaults[index - first] if index >= first else None)
    if arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg is not None:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation is not None else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default is not None else "")


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(isinstance(each, ast.Call) and ast.unparse(each.func) == "dataclass" for each in node.decorator_list)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Yield a row for each field and each property of a dataclass."""
    for index, statement in enumerate(node.body):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind) if name != "raw":
                text = _docstring_after(node.body, index)
            case ast.FunctionDef(name=name, returns=ast.expr() as kind) if any(
                isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in statement.decorator_list
            ):
                text = ast.get_docstring(statement)
            case _:
                continue
        yield f"| `{name}` | `{_cell(ast.unparse(kind))}` | {_cell(text or '')} |"


def _docstring_after(body: Sequence[ast.stmt], index: int) -> str:
    match body[index + 1 : index + 2]:
        case [ast.Expr(value=ast.Constant(value=str(text)))]:
            return text
        case _:
            return ""


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in dedent(text).split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
