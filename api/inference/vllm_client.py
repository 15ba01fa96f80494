"""HTTP requests to vLLM's OpenAI-compatible server, and to workers, which have two of its routes: models, adapters and
completions.

No redirects, no proxies of the environment, bounded answers. The routes and formats are those of vLLM 0.10 to 0.32
(vllm/entrypoints/openai and vllm/entrypoints/serve/lora).
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import httpx

from catalog.fleet.compatibility import lorry_version
from catalog.serving.probes import GenerationSettings, ProbeAnswer, ProbeKind, probe_body, tokens_of

Json = dict[str, Any]
MAX_BODY_BYTES = 2**22
MAX_LINE_BYTES = 2**20
MAX_ERROR_CHARS = 1000
CONNECT_SECONDS = 5.0
CHECK_SECONDS = 15.0
LOAD_SECONDS = 120.0
ANSWER_SECONDS = 600.0
"""How long a server may take for the first part of an answer, and between two parts."""
KEEP_SECONDS = 2.0
"""How long an idle connection is kept. vLLM closes it after 5 s, and a request sent at that moment would fail."""
MAX_CONNECTIONS = 512
CONNECTIONS_OF_PROJECT = 256
"""Open answers of all projects, and of one. Further requests wait."""
FIXED: Json = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""vLLM takes these from the model's generation_config.json otherwise. Lorry's API does not have them."""
SEED_BITS = 2**62 - 1
"""vLLM takes the seed -1 for none, and adds the number of the choice to it."""
NOT_FOUND = 404
RUNTIME_UPDATES = "Start vLLM with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."


class EndpointFailure(Exception):
    """Why a server did not do what was asked, as sentences.

    unreachable: there was no HTTP response, or only an error of a proxy. missing: it does not know the model. refused:
    any other error response.
    """

    def __init__(
        self, message: str, *, kind: Literal["unreachable", "missing", "refused"], error: Json | None = None
    ) -> None:
        """error: code, message and remedy, if the server is a worker."""
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.error = error


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerAddress:
    url: str
    api_key: str | None

    def headers(self) -> dict[str, str]:
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {"user-agent": f"lorry-serving/{lorry_version()}", "accept-encoding": "identity", **key}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model that a server lists. parent: the base model's name, for an adapter. root: where it was loaded from."""

    name: str
    root: str | None
    parent: str | None


class VllmClient:
    """Requests to vLLM servers. All methods raise EndpointFailure."""

    def __init__(self, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._transport = transport
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def models(self, server: ServerAddress) -> list[ServedModel]:
        found = await self._json(server, "GET", "/v1/models", timeout=CHECK_SECONDS)
        try:
            return [
                ServedModel(name=str(item["id"]), root=item.get("root"), parent=item.get("parent"))
                for item in found["data"]
            ]
        except (KeyError, TypeError, AttributeError):
            raise EndpointFailure("GET /v1/models did not return a list of models.", kind="refused") from None

    async def load(self, server: ServerAddress, *, name: str, path: str) -> None:
        try:
            await self._change(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except EndpointFailure as failure:
            if failure.kind == "missing":
                message = f"{failure.message} The server must see the adapter folder at the same path as Lorry."
                raise EndpointFailure(message, kind="refused") from None
            raise

    async def unload(self, server: ServerAddress, *, name: str) -> None:
        """Unload an adapter. It is no error if the server does not have it."""
        try:
            await self._change(server, "/v1/unload_lora_adapter", {"lora_name": name})
        except EndpointFailure as failure:
            if failure.kind != "missing":
                raise

    async def probe(
        self, server: ServerAddress, *, model: str, kind: ProbeKind, settings: GenerationSettings
    ) -> ProbeAnswer:
        """Let a model answer the probe prompt."""
        path, body = request_of(probe_body(kind), served_model=model, settings=settings)
        body |= {"stream": False}
        del body["stream_options"]
        found = await self._json(server, "POST", path, body=body, timeout=LOAD_SECONDS)
        try:
            events = logprob_events(found["choices"][0], is_chat=kind == "chat")
            return ProbeAnswer(prompt_tokens=int(found["usage"]["prompt_tokens"]), tokens=tokens_of(events))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            raise EndpointFailure(f"POST {path} did not return a completion.", kind="refused") from None

    @asynccontextmanager
    async def answering(self, server: ServerAddress, path: str, body: Json) -> AsyncGenerator[AsyncGenerator[Json]]:
        """Yield the chunks of a streamed answer, after the server has accepted the request."""
        async with self._response(server, "POST", path, body=body, timeout=ANSWER_SECONDS) as response:
            yield _chunks(response)

    async def _change(self, server: ServerAddress, path: str, body: Json) -> None:
        try:
            async with self._response(server, "POST", path, body=body, timeout=LOAD_SECONDS) as response:
                await _body(response)
        except EndpointFailure as failure:
            if failure.kind == "missing" and "lora" not in failure.message.replace(path, "").lower():
                raise EndpointFailure(f"The server has no route {path}. {RUNTIME_UPDATES}", kind="refused") from None
            raise

    async def _json(
        self, server: ServerAddress, method: str, path: str, *, body: Json | None = None, timeout: float
    ) -> Json:
        async with self._response(server, method, path, body=body, timeout=timeout) as response:
            content = await _body(response)
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EndpointFailure(f"{method} {path} did not return a JSON object.", kind="refused")
        return cast(Json, found)

    @asynccontextmanager
    async def _response(
        self, server: ServerAddress, method: str, path: str, *, body: Json | None = None, timeout: float
    ) -> AsyncGenerator[httpx.Response]:
        """Yield a successful response, whose body is not read yet."""
        limits = httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS)
        try:
            client = self._client()  # reads SSL_CERT_FILE
            request = client.build_request(
                method, f"{server.url}{path}", json=body, headers=server.headers(), timeout=limits
            )
            response = await client.send(request, stream=True)
            try:
                if not response.is_success:
                    raise await _error(response, method, path)
                yield response
            finally:
                await response.aclose()
        except httpx.PoolTimeout as failure:
            raise EndpointFailure(f"{method} {path} failed: too many requests are open.", kind="refused") from failure
        except (httpx.LocalProtocolError, UnicodeError):  # its text may contain the API key
            raise EndpointFailure(f"{method} {path} failed: the API key is invalid.", kind="refused") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as failure:
            reason = (str(failure) or type(failure).__name__).rstrip(".")
            raise EndpointFailure(f"{method} {path} failed: {reason}.", kind="unreachable") from failure

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            limits = httpx.Limits(
                max_connections=MAX_CONNECTIONS,
                max_keepalive_connections=64,
                keepalive_expiry=KEEP_SECONDS,
            )
            self._http = httpx.AsyncClient(
                transport=self._transport,
                verify=httpx.create_ssl_context(),  # trusts SSL_CERT_FILE, which trust_env=False ignores
                trust_env=False,
                follow_redirects=False,
                limits=limits,
            )
        return self._http


def request_of(
    parameters: Mapping[str, Any], *, served_model: str, settings: GenerationSettings | None, **further: Any
) -> tuple[str, Json]:
    """Return path and body of the streamed request for the parameters of an inference request.

    settings: of a serving endpoint; None for a worker, which has them itself. ignore_eos lets only the given tokens end
    an answer, without those that the server would take from its files. further: fields that only this server knows.
    Among them is vLLM's cache_salt: only requests with the same salt share cached prefixes, because a client can
    measure whether a prefix was cached.
    """
    body: Json = {
        "model": served_model,
        **{name: parameters[name] for name in ("n", "temperature", "top_p", "seed")},
        **{name: parameters[name] for name in ("presence_penalty", "frequency_penalty")},
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **further,
    }
    if settings is not None:
        body |= {
            "seed": body["seed"] & SEED_BITS,
            "ignore_eos": True,
            "stop_token_ids": list(settings.end_ids),
            **FIXED,
        }
    if parameters["stop"]:
        body["stop"] = parameters["stop"]
    num_logprobs, limit = parameters["num_logprobs"], parameters["max_tokens"]
    if "messages" in parameters:
        if num_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": num_logprobs}
        if limit is not None:
            body["max_completion_tokens"] = limit
        if "tools" in parameters:
            body["tools"] = parameters["tools"]
        messages = parameters["messages"]
        if settings is not None:
            messages = [_message(message) for message in messages]
            if settings.template_kwargs:
                body["chat_template_kwargs"] = settings.template_kwargs
        return "/v1/chat/completions", {**body, "messages": messages}
    if num_logprobs is not None:
        body["logprobs"] = num_logprobs
    return "/v1/completions", {**body, "prompt": parameters["prompts"], "max_tokens": limit}


def _message(message: Json) -> Json:
    """Return a message with `system` for `developer`, as the built-in engine renders it. A server may merge messages of
    developers with others."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def logprob_events(choice: Json, *, is_chat: bool) -> list[Json]:
    """Return the log-probabilities of a choice in the form of a worker's delta: without that of an end token, whose id
    is the `stop_reason`."""
    logprobs: Any = choice.get("logprobs")
    if not logprobs:
        return []
    events = _chat_logprobs(logprobs) if is_chat else _text_logprobs(logprobs)
    return events[:-1] if isinstance(choice.get("stop_reason"), int) else events


def _chat_logprobs(logprobs: Json) -> list[Json]:
    return [
        {
            "token": item["token"],
            "logprob": item["logprob"],
            "bytes": item.get("bytes"),
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"], "bytes": top.get("bytes")}
                for top in item.get("top_logprobs") or ()
            ],
        }
        for item in logprobs.get("content") or ()
    ]


def _text_logprobs(logprobs: Json) -> list[Json]:
    tops: list[dict[str, float] | None] = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return [
        {
            "token": token,
            "logprob": logprob,
            "bytes": list(token.encode()),
            "top_logprobs": [
                {"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in (top or {}).items()
            ],
        }
        for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    ]


async def _chunks(response: httpx.Response) -> AsyncGenerator[Json]:
    """Yield the JSON objects of server-sent events until `[DONE]`. A line may arrive in many small parts."""
    pending = bytearray()
    async for part in response.aiter_bytes():
        pending += part
        if b"\n" not in part:
            lines = []
        else:
            *lines, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            yield _chunk(data)
        if len(pending) > MAX_LINE_BYTES:
            raise EndpointFailure("The server sent a chunk that is too large.", kind="refused")
    raise EndpointFailure("The server ended the answer before it was complete.", kind="unreachable")


def _chunk(data: bytes) -> Json:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise EndpointFailure("The server sent a chunk that is not a JSON object.", kind="refused")
    found = cast(Json, chunk)
    if "error" in found:
        error: Any = found["error"]
        own = cast(Json, error) if isinstance(error, dict) and "remedy" in error else None
        raise EndpointFailure(f"The server failed: {_message_of(found)}", kind="refused", error=own)
    return found


async def _body(response: httpx.Response) -> bytes:
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise EndpointFailure(f"The server's response has more than {MAX_BODY_BYTES} bytes.", kind="refused")
    return bytes(content)


async def _error(response: httpx.Response, method: str, path: str) -> EndpointFailure:
    """Return the failure that an error response reports."""
    try:
        found = json.loads(await _body(response))
    except ValueError:
        found = None
    message = _message_of(cast(Json, found)) if isinstance(found, dict) else ""
    status = response.status_code
    text = f"{method} {path} returned {status}{f': {message}' if message else '.'}"
    if status in (401, 403):
        text += " Register the endpoint with the server's API key: --api-key-file."
    if status in (502, 503, 504):
        return EndpointFailure(text, kind="unreachable")
    return EndpointFailure(text, kind="missing" if status == NOT_FOUND else "refused")


def _message_of(found: Json) -> str:
    """Return the message of vLLM's error object, of that of older versions, or of FastAPI's."""
    error: Any = found.get("error")
    message: Any = cast(Json, error).get("message") if isinstance(error, dict) else error
    text = str(message or found.get("message") or found.get("detail") or "")
    printable = "".join(char if char.isprintable() else " " for char in text)[:MAX_ERROR_CHARS].strip()
    return printable if not printable or printable.endswith((".", "!", "?")) else f"{printable}."
