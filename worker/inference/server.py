"""The HTTP server of a worker, at which API servers send inference requests for its loaded trainer.

It has two of the routes of vLLM's OpenAI-compatible server, /v1/chat/completions and /v1/completions, always streams,
and accepts only the bearer token in the trainer's row. Requests have these further fields: `adapter` (digest of the
adapter's manifest, or null), `tenant` (whose requests take turns with those of others) and `priority` (1: of a batch).
The first chunk has `generation`, the settings with which another engine answers in the same way.

An error after the request was accepted is the last event of the stream. Its `code` shows whether the request can be
sent to another worker: NOT_BEGUN if no trainer began to answer it, INTERRUPTED if the trainer was lost.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import closing, suppress
from typing import Any

import uvicorn
from sqlalchemy import make_url

from catalog.inference.answer_format import text_logprobs
from catalog.settings import Settings
from catalog.tables.table import Json
from worker.inference.session import InferenceSession, OpenAnswer

PATHS = ("/v1/chat/completions", "/v1/completions")
DATABASE_PORT = 5432
MAX_PORTS = 64
"""Number of workers on one machine, with the ports from that of LORRY_INFERENCE_ADDRESS on."""
MAX_BODY_BYTES = 2**26
CLOSE_SECONDS = 5.0
KEEP_SECONDS = 60
"""How long an idle connection is kept: longer than API servers keep theirs, so that none is closed as they use it."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
log = logging.getLogger(__name__)


class InferenceServer:
    """Serves in a thread of its own, from `start` to `close`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.address = ""
        """HOST:PORT for API servers, once it has started."""
        self._session: InferenceSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_keep_alive=KEEP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Listen, and serve. Raises SystemExit if no port is free."""
        named, _, port = self._settings.inference_address.rpartition(":")
        host = named or _own_host(self._settings)
        self._socket = _listening("" if named else host, int(port or 0))  # a given host may be that of a published port
        port = self._socket.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._thread.start()
        self._started.wait()

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(CLOSE_SECONDS)

    def open(self, session: InferenceSession) -> None:
        """Answer the requests of this session from now on."""
        self._session = session

    def run(self, act: Callable[[], None]) -> None:
        """Call a function in the server's event loop, and wait until it has returned."""
        done = threading.Event()

        def call() -> None:
            try:
                act()
            finally:
                done.set()

        assert self._loop is not None, "it was started"
        self._loop.call_soon_threadsafe(call)
        done.wait()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._server.serve(sockets=[self._socket])

        with closing(self._socket):
            asyncio.run(serve())

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one HTTP request. The ASGI application."""
        session = self._session
        given = dict(scope["headers"]).get(b"authorization", b"")
        if session is None or not hmac.compare_digest(given, f"Bearer {session.secret}".encode()):
            await _refuse(send, 401, "The bearer token is not that of the loaded trainer.")
            return
        if scope["method"] != "POST" or scope["path"] not in PATHS:
            await _refuse(send, 404, f"The routes are POST {' and '.join(PATHS)}.")
            return
        body = await _body(receive)
        if body is None:
            return
        if not session.accepts:
            await _refuse(send, 503, "The trainer is about to be unloaded.")
            return
        is_chat = scope["path"] == PATHS[0]
        answer = session.begin(
            answer_body(body, is_chat=is_chat),
            adapter=body.get("adapter"),
            tenant=body.get("tenant", ""),
            is_batch=body.get("priority", 0) > 0,
        )
        leaving = asyncio.ensure_future(_disconnected(receive))
        leaving.add_done_callback(lambda _: answer.abandon())
        try:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for part in _chunks(answer, is_chat=is_chat):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the API server has disconnected
            pass
        finally:
            leaving.cancel()
            session.stop(answer)


def answer_body(request: Json, *, is_chat: bool) -> Json:
    """Return the body of `answer` in mailbox.py, without request_id and adapter, for a request in OpenAI's format."""
    names = ("model", "n", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty")
    body: Json = {name: request[name] for name in names} | {"stop": request.get("stop", [])}
    if not is_chat:
        limits = {"max_tokens": request["max_tokens"], "num_logprobs": request.get("logprobs")}
        return {**body, **limits, "prompts": request["prompt"]}
    limits = {"max_tokens": request.get("max_completion_tokens"), "num_logprobs": request.get("top_logprobs")}
    tools = {"tools": request["tools"]} if "tools" in request else {}
    return {**body, **limits, **tools, "messages": request["messages"]}


async def _chunks(answer: OpenAnswer, *, is_chat: bool) -> AsyncGenerator[bytes]:
    """Yield the events of a stream in OpenAI's format, with usage in each, as vLLM's continuous_usage_stats."""
    prompt_tokens = 0
    lengths: dict[int, int] = {}
    async for event in answer.events():
        if event["type"] == "waiting":
            yield b": waiting\n\n"
        elif event["type"] == "unanswered":
            yield _data({"error": event["error"]})
            return
        elif event["type"] == "answering":
            prompt_tokens = int(event["prompt_tokens"])
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
            yield _data({"choices": [], "usage": usage, "generation": event["generation"]})
        elif event["type"] == "generated":
            for delta in event["deltas"]:
                usage = {"prompt_tokens": prompt_tokens, "completion_tokens": delta["num_tokens"]}
                yield _data({"choices": [_choice(delta, lengths, is_chat=is_chat)], "usage": usage})
        else:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": event["completion_tokens"]}
            yield _data({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
            return


def _data(chunk: Json) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _choice(delta: Json, lengths: dict[int, int], *, is_chat: bool) -> Json:
    """lengths: characters of the earlier tokens of each choice, to which those of this one are added."""
    index: int = delta["index"]
    tokens: list[Json] = delta.get("logprobs", [])
    head: Json = {"index": index, "finish_reason": delta.get("finish")}
    if is_chat:
        return {**head, "delta": {"content": delta["text"]}, "logprobs": {"content": tokens} if tokens else None}
    start = lengths.get(index, 0)
    lengths[index] = start + sum(len(token["token"]) for token in tokens)
    return {**head, "text": delta["text"], "logprobs": text_logprobs(tokens, start=start) if tokens else None}


async def _body(receive: Receive) -> Json | None:
    """Return the request. None if the API server has disconnected."""
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or len(content) > MAX_BODY_BYTES:
            return None
        content += message.get("body", b"")
        if not message.get("more_body"):
            return json.loads(content)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Send, status: int, message: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": {"message": message}}).encode()})


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `port` or, while another worker of this machine uses it, at one of the next ones.

    host: empty for all addresses. port: 0 for any. Raises SystemExit.
    """
    family = socket.AF_INET6 if ":" in host or (not host and socket.has_dualstack_ipv6()) else socket.AF_INET
    for number in range(port, port + MAX_PORTS):
        with suppress(OSError):
            return socket.create_server(
                (host, number), family=family, dualstack_ipv6=not host and family != socket.AF_INET
            )
    raise SystemExit(
        f"No port from {port} to {port + MAX_PORTS - 1} is free for inference requests. Change LORRY_INFERENCE_ADDRESS."
    )


def _own_host(settings: Settings) -> str:
    """Return the address of this machine from which it reaches the database. API servers use the same database, so they
    reach this machine there. For SQLite and a local database it is the loopback address."""
    url = make_url(settings.resolved_database_url())
    if url.get_backend_name() == "sqlite" or not url.host:
        return "127.0.0.1"
    try:
        family, kind, _, _, place = socket.getaddrinfo(url.host, url.port or DATABASE_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a datagram socket sends nothing here
            host = str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
    return host if not ipaddress.ip_address(host.partition("%")[0]).is_unspecified else "127.0.0.1"
