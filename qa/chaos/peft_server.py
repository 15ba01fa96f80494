"""`python -m qa.chaos.peft_server BASE PORT`: an inference server with vLLM's routes, on transformers and PEFT.

It loads adapters at run time like vLLM, but needs no vLLM. It answers greedily, one request at a time, and only to
chats. Each token takes `TOKEN_SECONDS`, so that a fault hits an answer. `GET /answered` returns the number of complete
streamed answers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

Json = dict[str, Any]
SERVED = "base"
TOKEN_SECONDS = 0.5


class PeftModels:
    """A base model and the adapters that are loaded on it. `paths`: path by name."""

    def __init__(self, folder: str) -> None:
        self.paths: dict[str, str] = {}
        self.num_answered = 0
        self._folder = folder
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._adapted: Any = None
        self._lock = threading.Lock()

    def load(self, name: str, path: str) -> tuple[int, Any]:
        with self._lock:
            if name in self.paths:
                return _error(400, f"The lora adapter '{name}' has already been loaded.")
            if not os.path.exists(f"{path}/adapter_config.json"):  # noqa: PTH110
                return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(self._base, path, adapter_name=_key(name))
            else:
                self._adapted.load_adapter(path, adapter_name=_key(name))
            self.paths[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, Any]:
        with self._lock:
            if self.paths.pop(name, None) is None:
                return _error(404, f"The lora adapter '{name}' cannot be found.")
            self._adapted.delete_adapter(_key(name))
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def cards(self) -> Json:
        base = {"id": SERVED, "object": "model", "owned_by": "vllm", "root": self._folder, "parent": None}
        adapters = [{**base, "id": name, "root": path, "parent": SERVED} for name, path in self.paths.items()]
        return {"object": "list", "data": [base, *adapters]}

    def prompt(self, body: Json) -> list[int]:
        found = self._tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        return self._tokenizer(found, add_special_tokens=False)["input_ids"]

    def tokens(self, body: Json, prompt: list[int]) -> Iterator[Json]:
        """Yield the tokens of the greedy answer with their log-probabilities."""
        ids = list(prompt)
        for _ in range(body.get("max_completion_tokens") or 64):
            time.sleep(TOKEN_SECONDS)
            with self._lock, torch.inference_mode():
                logprobs = torch.log_softmax(self._logits(body["model"], ids), dim=-1)
            top = torch.topk(logprobs, 5)
            chosen = int(top.indices[0])
            if chosen == self._tokenizer.eos_token_id:
                return
            ids.append(chosen)
            alternatives = [
                {"token": self._text(int(token)), "logprob": float(value)}
                for token, value in zip(top.indices, top.values, strict=True)
            ]
            yield {**alternatives[0], "top_logprobs": alternatives}

    def _logits(self, name: str, ids: list[int]) -> torch.Tensor:
        inputs = torch.tensor([ids])
        if name != SERVED:
            self._adapted.set_adapter(_key(name))
            return self._adapted(input_ids=inputs).logits[0, -1]
        if self._adapted is None:
            return self._base(input_ids=inputs).logits[0, -1]
        with self._adapted.disable_adapter():
            return self._adapted(input_ids=inputs).logits[0, -1]

    def _text(self, token: int) -> str:
        return self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)


class PeftHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def __init__(self, models: PeftModels, *given: Any) -> None:
        self._models = models
        super().__init__(*given)

    def do_GET(self) -> None:
        known = {"/v1/models": self._models.cards(), "/answered": {"answered": self._models.num_answered}}
        self._answer(*((200, known[self.path]) if self.path in known else _error(404, "Not Found")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/load_lora_adapter":
            self._answer(*self._models.load(body["lora_name"], body["lora_path"]))
        elif self.path == "/v1/unload_lora_adapter":
            self._answer(*self._models.unload(body["lora_name"]))
        elif self.path != "/v1/chat/completions":
            self._answer(*_error(404, "Not Found"))
        elif body["model"] != SERVED and body["model"] not in self._models.paths:
            self._answer(*_error(404, f"The model `{body['model']}` does not exist."))
        else:
            self._complete(body)

    def _complete(self, body: Json) -> None:
        prompt = self._models.prompt(body)
        tokens = self._models.tokens(body, prompt)
        if body.get("stream"):
            self._stream(tokens, len(prompt))
            return
        found = list(tokens)
        message = {"role": "assistant", "content": "".join(token["token"] for token in found)}
        choice = {"index": 0, "message": message, "logprobs": {"content": found}, "finish_reason": "stop"}
        self._answer(200, {"choices": [choice], "usage": _usage(len(prompt), len(found))})

    def _stream(self, tokens: Iterator[Json], num_prompt: int) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        number = 0
        for number, token in enumerate(tokens, 1):
            choice = {"index": 0, "delta": {"content": token["token"]}, "finish_reason": None}
            self._send({"choices": [choice], "usage": _usage(num_prompt, number)})
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        self._send({"choices": [last], "usage": _usage(num_prompt, number)})
        self._models.num_answered += 1
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: Json) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, content: Any) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def _key(name: str) -> str:
    """Return the name of an adapter in PEFT, which does not allow dots."""
    return name.replace(".", "_").replace(":", "_")


def _error(status: int, message: str) -> tuple[int, Json]:
    return status, {"error": {"message": message, "type": "error", "param": None, "code": status}}


def _usage(num_prompt: int, number: int) -> Json:
    return {"prompt_tokens": num_prompt, "completion_tokens": number, "total_tokens": num_prompt + number}


def main(base: str, port: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer(("127.0.0.1", int(port)), partial(PeftHandler, PeftModels(base))).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
