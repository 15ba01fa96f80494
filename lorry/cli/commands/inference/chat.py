"""`lorry chat`: one answer of a model, or a conversation with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli import lookup
from lorry.cli.app import client
from lorry.cli.render import output
from lorry.errors import LorryError, NotFound

if TYPE_CHECKING:
    from lorry.client import Lorry

EXAMPLES = (
    'lorry chat support "Where is my parcel?"',
    'lorry chat smollm2 --system "Answer in one sentence."',
    "lorry chat support --temperature 0 < question.txt",
    'lorry chat smollm2 "Once upon a time" --complete --max-tokens 50',
)
PROMPT = "> "
BUILT_IN = "built-in"
"""The service's name of its own engine."""
_MAX_NAMES = 3


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Base model, adapter or checkpoint: a name, an ID, or a unique part of an adapter's name such as its "
            "suffix.",
        ),
    ],
    message: Annotated[
        str | None,
        typer.Argument(metavar="MESSAGE", help="Message to answer (default: standard input, or a conversation)."),
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(help="System message that precedes the conversation.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue the message as a text, without a chat template and a history.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum tokens to generate (default: the model's maximum length; with --complete: 16)."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Randomness; 0 always chooses the likeliest token (default: 1).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random choices (default: random).")] = None,
) -> None:
    """Send a message to a model and print its answer. Without a message, a conversation starts; Ctrl-D ends it."""
    if complete and system is not None:
        raise typer.BadParameter("--complete sends no conversation. Put the text into MESSAGE.", param_hint="--system")
    lorry = client()
    name = _model_name(lorry, model)
    history = [] if system is None else [{"role": "system", "content": system}]
    engines: list[str | None] = []

    def answer(text: str) -> None:
        history.append({"role": "user", "content": text})
        if complete:
            pieces = lorry.chat.complete(name, text, max_tokens=max_tokens, temperature=temperature, seed=seed)
        else:
            pieces = lorry.chat.stream(name, history, max_tokens=max_tokens, temperature=temperature, seed=seed)
        _report_loading(lorry, name)
        history.append({"role": "assistant", "content": _print(pieces)})
        if engines[-1:] != [pieces.engine]:
            engines.append(pieces.engine)
            _show_engine(pieces.engine)

    if message is None and output.is_interactive():
        output.echo(f"Conversation with {name}. Ctrl-D ends it.")
        return _converse(answer, history)
    text = sys.stdin.read().strip() if message is None else message
    if not text:
        raise typer.BadParameter("The message is empty. Pass a text, or write one to standard input.")
    answer(text)


def _converse(answer: Callable[[str], None], history: list[dict[str, str]]) -> None:
    """Answer each line of the user. After an error, the conversation continues without that line."""
    while (line := _read_line()) is not None:
        try:
            if line.strip():
                answer(line)
        except LorryError as error:
            del history[-1]
            output.echo(f"Error: {error.message.removesuffix(error.remedy).rstrip()} {error.remedy}")


def _print(pieces: Iterable[str]) -> str:
    """Print an answer piece by piece. Returns the whole text."""
    said = ""
    for piece in pieces:
        said += piece
        sys.stdout.write(output.clean(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return said


def _read_line() -> str | None:
    """Return the next line of the user; None at the end."""
    try:
        return input(PROMPT)
    except EOFError:
        output.echo("")
        return None


def _report_loading(lorry: Lorry, name: str) -> None:
    """Print on a terminal that a worker loads the base model first, which takes longer than an answer."""
    if output.is_watched() and (found := lorry.models.get(name)).inference == "loadable":
        output.echo(f"Loading the base model {found.base or found.id} on a worker. The answer follows…")


def _show_engine(engine: str | None) -> None:
    """Print on a terminal which engine has answered. None: the service is older and names none."""
    if engine is not None and output.is_watched():
        named = "the built-in engine" if engine == BUILT_IN else f"serving endpoint {engine}"
        output.echo(f"Answered by {named}.")


def _model_name(lorry: Lorry, typed: str) -> str:
    """Return the full name of a model. Raises LorryError if there is none."""
    if typed.startswith("ft:"):
        return typed
    models = list(lorry.models.list())
    if any(model.id == typed for model in models):
        return typed
    try:
        return lorry.adapters.get(lookup.adapter(lorry, typed)).name
    except NotFound as error:
        raise _unknown(typed, [model.id for model in models]) from error


def _unknown(typed: str, names: list[str]) -> LorryError:
    """Return the error for a name that no model has. names: of all base models and adapters."""
    bases = [name for name in names if not name.startswith("ft:")]
    suffixes = [part for name in names if name.startswith("ft:") for part in name.split(":")[3:4] if part]
    similar = get_close_matches(typed, dict.fromkeys((*bases, *suffixes)), n=_MAX_NAMES)
    if similar:
        return LorryError("model_not_found_but_similar", typed=typed, similar=" or ".join(similar))
    if bases:
        return LorryError("model_not_found", typed=typed, bases=", ".join(bases[:_MAX_NAMES]))
    return LorryError("no_models", typed=typed)
