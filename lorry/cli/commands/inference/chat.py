"""`lorry chat`: one answer of a model, or a conversation with it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli import lookup
from lorry.cli.app import client
from lorry.cli.render import output
from lorry.errors import LorryError

if TYPE_CHECKING:
    from lorry.client import Lorry

EXAMPLES = (
    'lorry chat support "Where is my parcel?"',
    'lorry chat smollm2 --system "Answer in one sentence."',
    "lorry chat support --temperature 0 < question.txt",
)
PROMPT = "> "


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
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Randomness; 0 always chooses the likeliest token (default: 1).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random choices (default: random).")] = None,
) -> None:
    """Send a message to a model and print its answer. Without a message, a conversation starts; Ctrl-D ends it."""
    lorry = client()
    name = _model_name(lorry, model)
    history = [] if system is None else [{"role": "system", "content": system}]

    def answer(text: str) -> None:
        history.append({"role": "user", "content": text})
        said = ""
        for piece in lorry.chat.stream(name, history, max_tokens=max_tokens, temperature=temperature, seed=seed):
            said += piece
            sys.stdout.write(output.clean(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        history.append({"role": "assistant", "content": said})

    if message is None and output.is_interactive():
        output.echo(f"Conversation with {name}. Ctrl-D ends it.")
        while (line := _read_line()) is not None:
            try:
                if line.strip():
                    answer(line)
            except LorryError as error:
                del history[-1]
                output.echo(f"Error: {error.message.removesuffix(error.remedy).rstrip()} {error.remedy}")
        return
    text = sys.stdin.read().strip() if message is None else message
    if not text:
        raise typer.BadParameter("The message is empty. Pass a text, or write one to standard input.")
    answer(text)


def _read_line() -> str | None:
    """Return the next line of the user; None at the end."""
    try:
        return input(PROMPT)
    except EOFError:
        output.echo("")
        return None


def _model_name(lorry: Lorry, typed: str) -> str:
    """Return the full name of a model."""
    if typed.startswith("ft:") or any(model.id == typed for model in lorry.models.list()):
        return typed
    return lorry.adapters.get(lookup.adapter(lorry, typed)).name
