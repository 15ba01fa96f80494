"""`lorry chat`: streams answers, keeps a conversation, and resolves short names of models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import Result

from lorry import Lorry
from lorry.cli.commands.inference import chat
from lorry.cli.render import output
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
PATH = "/v1/chat/completions"
ADAPTER = "ft:smollm2:default:support:1a2b"


def stream(*pieces: str, end: str = "data: [DONE]\n\n") -> Reply:
    chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    return Reply(body=body.encode(), headers={"content-type": "text/event-stream"})


@pytest.fixture(autouse=True)
def models(service: Script) -> None:
    models = [{"id": "smollm2", "object": "model"}, {"id": ADAPTER, "object": "model"}]
    service.on("GET", "/v1/models", {"data": models, "has_more": False})
    service.on("GET", f"/v1/adapters/{quote(ADAPTER, safe='')}", {"id": "ad-1", "name": ADAPTER})
    service.on("GET", "/v1/adapters", {"data": [{"id": "ad-1", "name": ADAPTER}], "has_more": False})


def sent(service: Script) -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in service.requests("POST", PATH)]


def test_message_is_answered_in_pieces(service: Script, run: Run) -> None:
    service.on("POST", PATH, stream("On its ", "way.\x1b[2J"))

    done = run("chat", "smollm2", "Where?", "--system", "Be brief.", "--temperature", "0", "--seed", "7")

    assert (done.exit_code, done.stdout) == (0, "On its way.\ufffd[2J\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert sent(service) == [
        {"model": "smollm2", "messages": messages, "stream": True, "temperature": 0.0, "seed": 7},
    ]


def test_suffix_of_an_adapter_is_enough_and_standard_input_is_a_message(service: Script, run: Run) -> None:
    service.on("POST", PATH, stream("Yes."))

    done = run("chat", "support", "--max-tokens", "5", input="Is it\nhere?\n")

    assert (done.stdout, done.stderr) == ("Yes.\n", "")
    (body,) = sent(service)
    assert (body["model"], body["max_completion_tokens"]) == (ADAPTER, 5)
    assert body["messages"] == [{"role": "user", "content": "Is it\nhere?"}]


def test_empty_message_is_refused(run: Run) -> None:
    done = run("chat", "smollm2", input=" \n")

    assert done.exit_code == 2
    assert "The message is empty." in done.stderr


def test_conversation_keeps_its_history_without_failed_messages(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"message": "Too long. Shorten it.", "type": "x", "param": None, "code": "x", "remedy": "Shorten it."}
    service.on("POST", PATH, stream("Hi."), Reply(status=400, body={"error": error}), stream("Bye."))
    typed = iter(["Hello", "", "Too long", "Goodbye"])
    monkeypatch.setattr(output, "is_interactive", lambda: True)
    monkeypatch.setattr(chat, "_read_line", lambda: next(typed, None))

    done = run("chat", "smollm2")

    assert done.stdout == "Hi.\nBye.\n"
    assert done.stderr.splitlines()[1:] == ["Error: Too long. Shorten it."]
    assert [message["content"] for message in sent(service)[-1]["messages"]] == ["Hello", "Hi.", "Goodbye"]


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("smolm2", "Did you mean smollm2? List"),
        ("suport", "Did you mean support? List"),
        ("nosuch", "Base models are, for example: smollm2. List"),
    ],
)
def test_unknown_model_is_an_error_that_names_what_exists(service: Script, run: Run, typed: str, known: str) -> None:
    done = run("chat", typed, "Hi")

    assert (done.exit_code, done.stdout) == (1, "")
    assert f"Error: No base model, adapter or checkpoint is named '{typed}'" in done.stderr
    assert known in done.stderr
    assert "`lorry models list`" in done.stderr
    assert "`lorry adapters list`" in done.stderr


def test_a_terminal_shows_the_engine_whenever_it_changes(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("gpu", "gpu", "built-in", None)
    answers = [stream("Hi.") for _ in names]
    for answer, name in zip(answers, names, strict=True):
        answer.headers.update({} if name is None else {"x-lorry-engine": name})
    service.on("POST", PATH, *answers)
    service.on("GET", "/v1/models/smollm2", {"id": "smollm2", "inference": "loaded"})
    typed = iter(["One", "Two", "Three", "Four"])
    monkeypatch.setattr(output, "is_interactive", lambda: True)
    monkeypatch.setattr(output, "is_watched", lambda: True)
    monkeypatch.setattr(chat, "_read_line", lambda: next(typed, None))

    done = run("chat", "smollm2")

    assert done.stdout == "Hi.\n" * 4
    assert done.stderr.splitlines()[1:] == [
        "Answered by serving endpoint gpu.",
        "Answered by the built-in engine.",
    ]


@pytest.mark.parametrize(
    ("found", "printed"),
    [
        ({"inference": "loadable", "base": None}, "Loading the base model smollm2 on a worker. The answer follows…\n"),
        ({"inference": "loadable", "base": "m"}, "Loading the base model m on a worker. The answer follows…\n"),
        ({"inference": "loaded", "base": None}, ""),
    ],
)
def test_a_terminal_shows_at_once_that_the_base_model_is_loaded_first(
    service: Script, run: Run, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], printed: str
) -> None:
    service.on("GET", "/v1/models/smollm2", {"id": "smollm2", **found})
    service.on("POST", PATH, stream("Hi."))
    monkeypatch.setattr(output, "is_watched", lambda: True)

    done = run("chat", "smollm2", "Hi")

    assert (done.stdout, done.stderr) == ("Hi.\n", printed)


def test_text_is_continued_without_a_conversation(service: Script, run: Run) -> None:
    chunks = [{"choices": [{"index": 0, "text": text}]} for text in (" a king", " lived.")]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    service.on("POST", "/v1/completions", Reply(body=body.encode(), headers={"content-type": "text/event-stream"}))

    done = run("chat", "smollm2", "There", "--complete", "--max-tokens", "5", "--temperature", "0")

    assert (done.exit_code, done.stdout) == (0, " a king lived.\n")
    (request,) = service.requests("POST", "/v1/completions")
    assert json.loads(request.body) == {
        "model": "smollm2", "prompt": "There", "max_tokens": 5, "temperature": 0.0, "stream": True,
    }  # fmt: skip


def test_text_to_continue_has_no_system_message(service: Script, run: Run) -> None:
    done = run("chat", "smollm2", "There", "--complete", "--system", "Be brief.")

    assert (done.exit_code, service.seen) == (2, [])
    assert "--complete sends no conversation" in done.stderr


def test_the_client_knows_the_engine_once_the_answer_has_begun(service: Script) -> None:
    answer = stream("On its ", "way.")
    answer.headers["x-lorry-engine"] = "built-in"
    service.on("POST", PATH, answer)

    with Lorry(service.url, "k") as lorry:
        pieces = lorry.chat.stream("smollm2", [{"role": "user", "content": "Where?"}])
        before = pieces.engine
        text = "".join(pieces)

    assert (before, text, pieces.engine) == (None, "On its way.", "built-in")


@pytest.mark.parametrize(
    ("end", "printed"),
    [
        ('data: {"error": {"message": "The worker was lost.", "code": "x"}}\n\n', "Error: The worker was lost."),
        ("", "Error: The response stream ended early."),
    ],
)
def test_answer_that_breaks_off_is_an_error(service: Script, run: Run, end: str, printed: str) -> None:
    service.on("POST", PATH, stream("On", end=end))

    done = run("chat", "smollm2", "Where?")

    assert done.exit_code == 1
    assert done.stdout == "On"
    assert printed in done.stderr
