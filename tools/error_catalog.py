"""All error messages in the source code, as templates by error code."""

import ast
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from catalog.states import ENDINGS, JobState

ROOT = Path(__file__).parents[1]
NOT_FOUND_REMEDY = "Check the ID, and that the API key belongs to the project that owns the {}."
CODE = re.compile(r"[a-z]+(_[a-z0-9]+)+")
BARE = re.compile(r"[\W_]*(?:\{\w+\}[\W_]*)+")
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")
ONE = "1 "
"""How the singular begins in a helper such as `"1 step" if number == 1 else f"{number} steps"`."""
MOST_CALLERS = 3
"""Levels of callers that are followed to the text of an argument."""
EXPLANATIONS: dict[str, tuple[str, str]] = {
    "artifact_damaged": (
        "A stored file is missing, or its content does not match its digest.",
        "Restore the store from a backup, or upload the damaged file or train the damaged adapter again. On the "
        "server, `python -m api verify` lists all damaged objects.",
    ),
    "base_changed": ("", "Create a new plan, with another base model if this one was deleted."),
    "base_not_loaded": ("The base model could not be loaded on the worker.", "Send the request again."),
    "batch_cancelled": ("", "Send the request again in a new batch."),
    "batch_expired": ("", "Send the request again in a new batch."),
    "disk_error": (
        "The disk of a worker failed.",
        "Check the disk of that machine. Waiting work continues automatically.",
    ),
    "diverged": (
        "Training diverged: the loss or the weights became NaN or infinite.",
        "Lower the learning rate, or check the data around the step that the message names.",
    ),
    "evaluations_too_late": (
        "evaluation.every_steps is {every_steps}, but the job has at most {num_steps} steps, so the validation loss is "
        "measured only at the start and at the end.",
        "Set evaluation.every_steps to less than {num_steps}, or omit it to use an interval that suits the job.",
    ),
    "no_evaluation_in_time": (
        "",
        "Set evaluation.every_steps to less than {num_steps}, or omit it to use an interval that suits the job.",
    ),
    "few_steps": ("", "Raise n_epochs or max_steps, lower batch_size, or add rows."),
    "file_not_found": ("", "Upload the file again, then create a new plan with the new file's ID."),
    "file_too_large": ("", "Split the file into several files, or ask the operator to raise LORRY_MAX_FILE_BYTES."),
    "fits_no_worker": (
        "The job needs more memory than the largest worker has.",
        "Add a worker with the GPUs that the message names. Or lower lora.rank, set quantization to 'nf4', or use a "
        "smaller base model.",
    ),
    "gang_incomplete": (
        "The workers of a gang can't start a training round together: the message names the missing worker or the "
        "cause.",
        "The gang retries automatically. If this recurs, check that its workers are running and not cordoned "
        "(`lorry workers list`), and read their logs.",
    ),
    "import_failed": (
        "The import of {name} failed.",
        "Check the source, then add the model again: `lorry models add {name} SOURCE`",
    ),
    "invalid_multipart": (
        "",
        "Send a multipart/form-data request: with the fields 'purpose' and 'file' for a file, or with the field 'data' "
        "for a part of an upload.",
    ),
    "invalid_settings": ("LORRY_LEASE_SECONDS is invalid. Input should be greater than 1.", ""),
    "invalid_value": ("", "Correct the field that the message names, or the related fields that all trials share."),
    "job_not_waiting": (
        "",
        "Pause a running job instead of holding it: `lorry jobs pause {id}`. Resume a paused job: "
        "`lorry jobs resume {id}`. To repeat a finished job, create a new one.",
    ),
    "missing_required_parameter": (
        "",
        "Send a multipart/form-data request: with the fields 'purpose' and 'file' for a file, or with the field 'data' "
        "for a part of an upload.",
    ),
    "model_import_failed": ("The import of base model {name} failed: {reason}.", ""),
    "model_not_found": ("", "Choose a base model from `lorry models list`."),
    "node_failed": ("", "Check the disk, memory and processes of the worker's machine."),
    "not_servable": (
        "The server can't serve the adapter, because of the job's settings or of the base model's architecture.",
        "Change the setting named in the message, or merge the adapter. See *Serve an adapter*.",
    ),
    "not_supported": ("", "Use the alternative named in the response."),
    "part_too_large": ("", "Split the file into smaller parts."),
    "plan_failed": ("Plan {id} failed: {error}", ""),
    "preparation_lost": (
        "Tokenization of the files failed several times. The last time, its worker was lost.",
        "Ask the operator why workers are lost: the file may need more memory than a worker has. Then submit the job "
        "again.",
    ),
    "quarantined": (
        "The job failed too often without a new checkpoint. The message names the number of attempts and the last "
        "failure.",
        "Follow the fix in the message, then resubmit the job or continue its newest checkpoint. `evidence` lists how "
        "and where the latest attempts ended.",
    ),
    "quota_exceeded": (
        "",
        "Wait until jobs finish or the usage resets, or delete unused files and adapters. An operator can raise the "
        "limit: `lorry projects update {name}`.",
    ),
    "source_unreachable": ("The source of the base model can't be read.", ""),
    "unknown_parameter": ("", "Remove the field, or correct its spelling."),
    "unknown_target_modules": (
        "",
        "Use one of the layer names that the response lists. To target all layers, set lora.target_modules to "
        "'all-linear'.",
    ),
    "user_error": (
        "The job can't be trained with these files and settings. The message gives the reason.",
        "Correct the file or the setting that the message names, and submit the job again.",
    ),
    "verification_failed": (
        "PEFT's logits with the exported adapter differ from the training logits by more than the tolerance.",
        "Report the job's logs to the operator. Its checkpoints are kept.",
    ),
}
"""By code: message and remedy of errors whose texts are put together while the program runs. Empty: found in the
code."""
FINAL_REASONS = tuple(
    reason.value for reason, ending in ENDINGS.items() if ending.state is JobState.FAILED and not ending.retryable
)
"""Reasons that fail a job at once. A job that ends without an error of its own gets the reason as the code."""
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
    modules: list[_Module] = []
    for package in PACKAGES:
        sources = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / package).rglob("*.py"))}
        fields = _codes_of_fields(sources.values())
        for path, tree in sources.items():
            modules.append(_Module(tree, path.relative_to(root), fields, modules, is_importable=root == ROOT))
    for module in modules:
        found.update(_explained(entry) for entry in module.messages())
    return sorted(found)


def is_bare(template: str) -> bool:
    """Return whether a template, or one of its alternatives, is nothing but placeholders."""
    return any(BARE.fullmatch(part) for part in template.split(" / "))


def _explained(entry: ErrorMessage) -> ErrorMessage:
    """Replace a message or remedy that is nothing but placeholders by its explanation."""
    message, remedy = EXPLANATIONS.get(entry.code, ("", ""))
    return replace(
        entry,
        message=message if message and is_bare(entry.message) else entry.message,
        remedy=remedy if remedy and (is_bare(entry.remedy) or not entry.remedy) else entry.remedy,
    )


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

    def __init__(
        self, tree: ast.Module, path: Path, fields: dict[str, set[str]], others: "list[_Module]", *, is_importable: bool
    ) -> None:
        """others: all modules, once they are read. is_importable: whether constants may be read by importing it."""
        self._tree = tree
        self._path = path.as_posix()
        self._import_name = ".".join(path.with_suffix("").parts) if is_importable else None
        self._fields = fields
        self._others = others
        self._assigned: dict[str, list[tuple[int, ast.expr]]] = {}
        self._spans: list[range] = []
        self._defaults: dict[str, dict[str, ast.expr]] = {}
        self._imported: set[str] = set()
        self._functions: dict[str, _Function] = {}
        self._named: dict[range, str] = {}
        self._calls: list[ast.Call] = []
        for node in ast.walk(tree):
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                ) if isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp):
                    self._assigned.setdefault(name, []).append((node.lineno, value))
                case ast.FunctionDef(name=name, args=arguments) | ast.AsyncFunctionDef(name=name, args=arguments):
                    self._spans.append(_span(node))
                    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                    self._defaults[name] = {argument.arg: default for argument, default in named if default is not None}
                case ast.Import(names=names):
                    self._imported.update(each.asname or each.name.partition(".")[0] for each in names)
                case ast.Call():
                    self._calls.append(node)
                case _:
                    pass
        for node in ast.walk(tree):
            inner = node.body if isinstance(node, ast.Module) else []
            for function in inner:
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                    self._functions.setdefault(function.name, _Function(function))
                    self._named[_span(function)] = function.name

    def messages(self) -> Iterator[ErrorMessage]:
        for node in ast.walk(self._tree):
            match node:
                case ast.Call():
                    yield from self._of_call(node)
                case ast.Dict():
                    yield from self._of_dict(node)
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
                text = f"No {noun} with the ID {{id}}." if message is None else self._template(message)
                yield self._entry(f"{noun.replace(' ', '_')}_not_found", text, remedy)
            case "NoLongerKept", [ast.Constant(value=str(noun)), _]:
                yield self._entry(f"{noun}_expired", f"The files for {noun} {{id}} have been deleted.", remedy)
            case "BadRow", [code, reason, fix]:
                for each in self._codes(code):
                    for problem, solution, path in self._expanded(reason, fix):
                        yield ErrorMessage(each, f"Line {{number}}: {problem}.", solution, path)
            case _:
                message = keywords.get("message") or (call.args[0] if call.args else None)
                if message is not None and "code" in keywords:
                    for each in self._codes(keywords["code"]):
                        for text, fix, path in self._expanded(message, keywords.get("remedy", "")):
                            yield ErrorMessage(each, text, fix, path)

    def _of_dict(self, node: ast.Dict) -> Iterator[ErrorMessage]:
        """Yield the errors that are stored or sent as `{"code": …, "message": …}`."""
        given = {key.value: value for key, value in zip(node.keys, node.values, strict=True) if _is_text(key)}
        if not {"code", "message"} <= given.keys() or self._path.startswith("api/schemas/"):  # examples
            return
        code = given["code"]
        own = self._functions.get(self._named.get(self._around(node.lineno) or range(0), ""))
        if own is not None and isinstance(code, ast.Name) and code.id in own.parameters:
            for caller, call in self._callers(own.name):
                message, remedy = (own.argument(call, name) for name in ("message", "remedy"))
                if (passed := own.argument(call, code.id)) is not None and message is not None:
                    for each in caller._codes(passed):
                        fix = "" if remedy is None else caller._template(remedy)
                        yield ErrorMessage(each, caller._template(message), fix, caller._path)
            return
        if ast.unparse(code) == "reason.value":
            yield from (self._entry(each, "{message}", "{remedy}") for each in FINAL_REASONS)
            return
        for each in [] if isinstance(code, ast.Attribute) else self._codes(code):
            for text, fix, path in self._expanded(given["message"], given.get("remedy", "")):
                if each not in FINAL_REASONS:
                    yield ErrorMessage(each, text, fix, path)

    def _entry(self, code: str, message: str, remedy: str) -> ErrorMessage:
        return ErrorMessage(code, message, remedy, self._path)

    def _expanded(
        self, message: ast.expr | str, remedy: ast.expr | str, *, levels: int = MOST_CALLERS
    ) -> Iterator[tuple[str, str, str]]:
        """Yield (message, remedy, path). A text that is a parameter of its function is that of each caller."""
        line = next((each.lineno for each in (message, remedy) if isinstance(each, ast.expr)), 0)
        name = self._named.get(self._around(line) or range(0), "")
        own = self._functions.get(name)
        sent = [
            each.id
            if own and isinstance(each, ast.Name) and each.id in own.parameters and not self._value(each.id, line)
            else None
            for each in (message, remedy)
        ]
        callers = self._callers(name) if own and levels and any(sent) else []
        texts = [self._template(each) if isinstance(each, ast.expr) else each for each in (message, remedy)]
        for caller, call in callers:
            assert own is not None
            given = [
                text if parameter is None else own.argument(call, parameter) or text
                for parameter, text in zip(sent, texts, strict=True)
            ]
            given = [
                self._template(each) if isinstance(each, ast.expr) and each in own.defaults.values() else each
                for each in given
            ]
            yield from caller._expanded(*given, levels=levels - 1)
        if not callers:
            yield texts[0], texts[1], self._path

    def _callers(self, name: str) -> "list[tuple[_Module, ast.Call]]":
        is_unique = sum(name in other._functions for other in self._others) == 1
        return [
            (other, call)
            for other in (self._others if is_unique else [self])
            for call in other._calls
            if ast.unparse(call.func).rpartition(".")[2] == name
        ]

    def _around(self, line: int) -> range | None:
        """Return the lines of the innermost function around a line."""
        return max((span for span in self._spans if line in span), key=lambda span: span.start, default=None)

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
        function = self._around(line)
        assigned = sorted(self._assigned.get(name, []), key=lambda each: each[0])
        before = [(number, value) for number, value in assigned if number <= line]
        inside = [value for number, value in before if function is not None and number in function]
        outside = [value for number, value in before if not any(number in span for span in self._spans)]
        return (inside or outside or [None])[-1]

    def _constant(self, node: ast.expr) -> Any:
        """Return the value of an expression of module constants only; None for other expressions."""
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        outer = {
            id(each.value)
            for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and CONSTANT.fullmatch(each.attr)
        }
        if self._import_name is None or not names or isinstance(node, ast.IfExp | ast.Compare):
            return None
        if not all(CONSTANT.fullmatch(each.id) or (id(each) in outer and each.id.islower()) for each in names):
            return None
        if any(self._value(each.id, each.lineno) is not None and self._around(each.lineno) is None for each in names):
            return None
        try:
            values = vars(importlib.import_module(self._import_name))
            value = eval(compile(ast.Expression(node), self._path, "eval"), dict(values))  # noqa: S307 - our own source
        except (NameError, AttributeError, TypeError):
            return None
        if isinstance(value, str):
            value = value.replace(sys.executable, "{executable}")
            return None if str(ROOT) in value or str(Path.home()) in value else value
        return value if isinstance(value, int | float) else None

    def _template(self, node: ast.expr) -> str:  # noqa: PLR0911
        if (constant := self._constant(node)) is not None:
            return str(constant)
        match node:
            case ast.Constant(value=value):
                return str(value)
            case ast.Name(id=name) if (value := self._value(name, node.lineno)) is not None:
                return self._template(value)
            case ast.JoinedStr():
                return "".join(self._template(value) for value in node.values)
            case ast.FormattedValue():
                return self._formatted(node)
            case ast.BinOp(op=ast.Add()):
                return self._template(node.left) + self._template(node.right)
            case ast.IfExp():
                return f"{self._template(node.body)} / {self._template(node.orelse)}"
            case _:
                return self._placeholder(node)

    def _formatted(self, node: ast.FormattedValue) -> str:
        value = node.value
        if isinstance(value, ast.Name) and (assigned := self._value(value.id, node.lineno)) is not None:
            value = assigned
        constant = value.value if isinstance(value, ast.Constant) else self._constant(value)
        if constant is not None:
            text = self._template(node.format_spec) if node.format_spec is not None else ""
            return repr(constant) if node.conversion == ord("r") else format(constant, text)
        match value:
            case ast.JoinedStr():
                return self._template(value)
            case ast.IfExp():
                return _choice(value) or self._placeholder(node.value)
            case ast.Call():
                return self._with_noun(value) or self._placeholder(value)
            case _:
                return self._placeholder(node.value)

    def _with_noun(self, call: ast.Call) -> str | None:
        """Return number and noun of a helper such as `counted(number, "row")` or `_rows(number)`."""
        name = ast.unparse(call.func).rpartition(".")[2]
        function = next((each._functions[name] for each in (self, *self._others) if name in each._functions), None)
        if function is None or not call.args:
            return None
        number = self._placeholder(call.args[0])
        match function.result, call.args[1:]:
            case ast.IfExp(body=ast.Constant(value=str(one))), [] if one.startswith(ONE):
                return f"{number} {one.removeprefix(ONE)}s"
            case ast.IfExp(), []:
                return _choice(function.result)
            case ast.JoinedStr() | ast.IfExp(), [ast.Constant(value=str(noun))] if function.parameters[1:2] == ["noun"]:
                return f"{number} {noun}s"
            case _:
                return None

    def _placeholder(self, node: ast.expr) -> str:
        """Return the last name in an expression: `{adapter}` for `repr(self.adapter)`."""
        called = {id(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        parts = [
            each for each in ast.walk(node) if isinstance(each, ast.Attribute | ast.Name) and id(each) not in called
        ]
        inner = {id(part.value) for part in parts if isinstance(part, ast.Attribute)}
        names = [part.attr if isinstance(part, ast.Attribute) else part.id for part in parts if id(part) not in inner]
        names = [name for name in names if name not in self._imported]
        functions = [ast.unparse(call.func).rpartition(".")[2] for call in ast.walk(node) if isinstance(call, ast.Call)]
        return f"{{{[*functions[:1], *names][-1].strip('_').lower() if names or functions else '…'}}}"


class _Function:
    def __init__(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = node.args
        self.name = node.name
        positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args) if each.arg not in ("self", "cls")]
        self.parameters = [*positional, *(each.arg for each in arguments.kwonlyargs)]
        self._num_positional = len(positional)
        defaults = zip(self.parameters[::-1][len(arguments.kwonlyargs) :], arguments.defaults[::-1], strict=False)
        named = zip((each.arg for each in arguments.kwonlyargs), arguments.kw_defaults, strict=True)
        self.defaults = {name: value for name, value in (*defaults, *named) if value is not None}
        returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
        self.result = returned[0] if len(returned) == 1 else None

    def argument(self, call: ast.Call, parameter: str) -> ast.expr | None:
        """Return the value of a parameter in a call; None if it can't be seen."""
        for keyword in call.keywords:
            if keyword.arg == parameter:
                return keyword.value
        index = self.parameters.index(parameter)
        if index < min(len(call.args), self._num_positional):
            return call.args[index]
        return self.defaults.get(parameter)


def _is_text(node: ast.expr | None) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _span(node: ast.FunctionDef | ast.AsyncFunctionDef) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _choice(node: ast.IfExp) -> str | None:
    """Return the plural of two forms, or two short texts as `path/query string`; None for other alternatives."""
    match node:
        case ast.IfExp(
            test=ast.Compare(ops=[ast.Eq()], comparators=[ast.Constant(value=1)]),
            orelse=ast.Constant(value=str(plural)),
        ):
            return plural
        case ast.IfExp(body=ast.Constant(value=str(one)), orelse=ast.Constant(value=str(two))) if one and two:
            return f"{one}/{two}" if len(one.split()) <= 2 >= len(two.split()) else None
        case _:
            return None
