"""A server with vLLM's routes and error objects on loopback, and a worker whose trainer gives the same answers.

They depend on the model's name. The formats are those of vLLM 0.32.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from catalog.db.database import Database
from catalog.resources.pack_key import pack_key
from catalog.settings import Settings
from tests.api.fake_trainer import FakeTrainer, Step, begun, ended, failed, said

Json = dict[str, Any]
PROMPT_TOKENS = 12
SERVED = "org/base"
GENERATION: Json = {
    "text": {"end_ids": [2]},
    "chat": {"end_ids": [2, 5], "template_kwargs": {"date_string": "26 Jul 2024"}},
}
"""The report of the trainer about the base model."""
END: Json = {"token": "<end>", "logprob": -0.1, "bytes": None, "top_logprobs": []}
NO_ROUTE: tuple[int, Json] = (404, {"detail": "Not Found"})


def tokens_of(model: str, number: int = 6) -> list[Json]:
    """Return the model's greedy answer. Adapters agree with the base model in the first token."""
    found: list[Json] = []
    for place in range(number):
        name = "base" if place == 0 or not model.startswith("ft:") else model
        seed = hashlib.sha256(f"{name} {place}".encode()).digest()
        text, logprob = f" w{seed[0]}", -1 - seed[1] / 256
        found.append(
            {
                "token": text,
                "logprob": logprob,
                "bytes": list(text.encode()),
                "top_logprobs": [
                    {"token": text, "logprob": logprob, "bytes": None},
                    {"token": " other", "logprob": -6.0, "bytes": None},
                ],
            }
        )
    return found


@dataclass(kw_only=True)
class FakeVllm:
    """The state of a server, which tests change. `requests`: path and body of each request."""

    url: str = ""
    api_key: str | None = None
    allows_updates: bool = True
    max_rank: int = 16
    drift: float = 0.0
    """Added to the log-probabilities."""
    ignores_adapters: bool = False
    prompt_tokens: int = PROMPT_TOKENS
    breaks_after: int | None = None
    """Chunks of a streamed answer after which the connection is closed."""
    fails_with: int | None = None
    """Status of answers to completions."""
    end_id: int | None = None
    """Id of the token END that follows each answer. It ends the answer if the request names it."""
    finish: str = "length"
    """Reason with which other answers end."""
    adapters: dict[str, str] = field(default_factory=dict[str, str])
    """Path by name."""
    holds: str | None = None
    """Path whose requests wait until `released` is set."""
    released: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, Json]] = field(default_factory=list[tuple[str, Json]])

    def has_received(self, path: str) -> bool:
        return any(path == received for received, _ in self.requests)

    def completions(self) -> list[Json]:
        """Return the bodies of requests for completions other than probes."""
        return [body for path, body in self.requests if path.endswith("completions") and body.get("stream")]


def error(status: int, message: str, kind: str) -> tuple[int, Json]:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _load(fake: FakeVllm, body: Json) -> tuple[int, Any]:
    name, path = body["lora_name"], Path(body["lora_path"])
    if name in fake.adapters:
        message = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set"
        return error(400, f"{message} 'load_inplace' to True.", "InvalidUserInput")
    config = path / "adapter_config.json"
    if not config.exists():
        return error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
    rank = json.loads(config.read_text())["r"]
    if rank > fake.max_rank:
        message = f"LoRA rank {rank} is greater than max_lora_rank {fake.max_rank}."
        return error(500, message, "InternalServerError")
    fake.adapters[name] = str(path)
    return 200, f"Success: LoRA adapter '{name}' added successfully."


def _unload(fake: FakeVllm, body: Json) -> tuple[int, Any]:
    name = body["lora_name"]
    if fake.adapters.pop(name, None) is None:
        return error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    return 200, f"Success: LoRA adapter '{name}' removed successfully."


def _models(fake: FakeVllm) -> Json:
    base = {"id": SERVED, "object": "model", "owned_by": "vllm", "root": "/models/base", "parent": None}
    cards = [{**base, "id": name, "root": path, "parent": SERVED} for name, path in fake.adapters.items()]
    return {"object": "list", "data": [{**base, "max_model_len": 512}, *cards]}


def _tokens(fake: FakeVllm, body: Json) -> list[Json]:
    model = SERVED if fake.ignores_adapters else body["model"]
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 6
    found = tokens_of("base" if model == SERVED else model)[:limit]
    for token in found:
        token["logprob"] += fake.drift
        token["top_logprobs"][0]["logprob"] += fake.drift
    return found if fake.end_id is None else [*found, END]


def _text_of(fake: FakeVllm, token: Json, body: Json) -> str:
    return "" if token is END and fake.end_id in body["stop_token_ids"] else token["token"]


def _ending(fake: FakeVllm, body: Json) -> Json:
    if fake.end_id is None:
        return {"finish_reason": fake.finish, "stop_reason": None}
    is_end = fake.end_id in body["stop_token_ids"]
    return {"finish_reason": "stop" if is_end else "length", "stop_reason": fake.end_id if is_end else None}


def _usage(fake: FakeVllm, number: int) -> Json:
    total = fake.prompt_tokens + number
    return {"prompt_tokens": fake.prompt_tokens, "completion_tokens": number, "total_tokens": total}


def _text_logprobs(tokens: list[Json]) -> Json:
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": [0] * len(tokens),
    }


def _whole(fake: FakeVllm, body: Json, *, is_chat: bool) -> Json:
    tokens = _tokens(fake, body)
    text = "".join(_text_of(fake, token, body) for token in tokens)
    choice: Json = {"index": 0, **_ending(fake, body)}
    if is_chat:
        choice |= {"message": {"role": "assistant", "content": text}, "logprobs": {"content": tokens}}
    else:
        choice |= {"text": text, "logprobs": _text_logprobs(tokens)}
    return {"id": "x", "model": body["model"], "choices": [choice], "usage": _usage(fake, len(tokens))}


def _chunks(fake: FakeVllm, body: Json, *, is_chat: bool) -> Iterator[Json]:
    tokens = _tokens(fake, body)
    if is_chat:
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield {"choices": [first], "usage": _usage(fake, 0)}
    for number, token in enumerate(tokens, 1):
        choice: Json = {"index": 0, "finish_reason": None, "logprobs": None}
        choice |= _ending(fake, body) if number == len(tokens) else {}
        wants = body.get("logprobs") not in (None, False)
        if is_chat:
            choice |= {"delta": {"content": _text_of(fake, token, body)}}
            choice |= {"logprobs": {"content": [token]}} if wants else {}
        else:
            choice |= {"text": _text_of(fake, token, body)}
            choice |= {"logprobs": _text_logprobs([token])} if wants else {}
        yield {"choices": [choice], "usage": _usage(fake, number)}
    yield {"choices": [], "usage": _usage(fake, len(tokens))}


class _VllmServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


def _response(fake: FakeVllm, path: str, body: Json) -> tuple[int, Any] | None:
    """Return status and content, or None for a stream."""
    if path.endswith("_lora_adapter") and fake.allows_updates:
        return (_unload if "unload" in path else _load)(fake, body)
    if path not in ("/v1/chat/completions", "/v1/completions"):
        return NO_ROUTE
    if fake.fails_with is not None:
        return error(fake.fails_with, "It failed.", "InternalServerError")
    if body["model"] != SERVED and body["model"] not in fake.adapters:
        return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
    return None if body.get("stream") else (200, _whole(fake, body, is_chat="chat" in path))


def _handler(fake: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # one request per connection, so that a stopped server answers no more

        def do_GET(self) -> None:
            found = (200, _models(fake)) if self.path == "/v1/models" else NO_ROUTE
            self._answer(*found)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fake.requests.append((self.path, body))
            if self.path == fake.holds:
                fake.released.wait()
            is_known = fake.api_key is None or self.headers.get("authorization") == f"Bearer {fake.api_key}"
            found = _response(fake, self.path, body) if is_known else (401, {"error": "Unauthorized"})
            if found is None:
                self._stream(_chunks(fake, body, is_chat="chat" in self.path))
            else:
                self._answer(*found)

        def _answer(self, status: int, content: Any) -> None:
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self, chunks: Iterator[Json]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            self.close_connection = True
            for number, chunk in enumerate(chunks):
                if number == fake.breaks_after:
                    return
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    return Handler


@contextmanager
def serving(fake: FakeVllm, *, port: int = 0) -> Iterator[FakeVllm]:
    """Run the server. port: that of an earlier server, to simulate its restart."""
    server = _VllmServer(("127.0.0.1", port), _handler(fake))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        fake.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class ReferenceTrainer(FakeTrainer):
    """Answers like FakeVllm, with `tokens_of` the model.

    `answered`: the models of answered requests. has_template: False: chat requests fail.
    """

    def __init__(self, db: Database, settings: Settings, *, digest: str) -> None:
        super().__init__(db, settings, digest=digest, key=pack_key(digest, "bfloat16"))
        self.answered: list[str] = []
        self.has_template = True

    def steps(self, request: Json) -> Iterator[Step]:
        model = request["model"] if request["adapter"] is not None else "base"
        self.answered.append(model)
        is_chat = "messages" in request
        if is_chat and not self.has_template:
            yield failed("base_has_no_chat_template")
            return
        yield begun(PROMPT_TOKENS, **{kind: GENERATION[kind] for kind in ("text", "chat") if is_chat or kind == "text"})
        tokens = tokens_of(model)[: request["max_tokens"] or 6]
        for number, token in enumerate(tokens, 1):
            finish = "length" if number == len(tokens) else None
            yield said(token["token"], number, logprobs=[token], finish=finish)
        yield ended(len(tokens))
