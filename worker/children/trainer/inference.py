"""Answers inference requests with the loaded base model, between the ticks that train its jobs."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, cast

from catalog.datasets.chat import Chat
from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.engine.engine import Engine
from lora_core.errors import BrokenPass, LoraCoreError, OutOfMemory
from lora_core.forward.continuous_batch import ContinuousBatch, NewToken, Prompt
from lora_core.forward.sampling import ChosenToken, Sampling
from lora_core.runtime.device_errors import is_device_fault
from worker.children.tokenizer.chat_template import Refused, date_arguments
from worker.children.tokenizer.text_encoder import BaseText
from worker.children.trainer.text_stream import INCOMPLETE, TextStream
from worker.protocol.errors import error_report, print_handled
from worker.protocol.mailbox import AnswerBody, Json, TrainerDirectory

CACHE_SHARE = 0.25
"""Part of the device's free memory that the key-value cache may take. Jobs that are admitted later need the rest."""
ADAPTER_SHARE = 0.1
"""Part of the device's free memory beyond which no adapter is kept for later requests."""
CACHED_ADAPTERS = 64
"""Number of adapters beyond which none is kept for later requests."""
EVENT_LOGPROBS = 32
"""Maximum number of tokens with log-probabilities in one event. Those of a possible stop sequence leave together, and a
longer line would exceed MAX_LINE_BYTES of api/inference/vllm_client.py."""
CONTEXT_TOKENS = 5
"""Last tokens of a prompt, after which its answer is decoded."""
UNLIMITED_TOKENS = 4096
"""Maximum number of tokens of an answer without max_tokens, if the base model has no maximum length."""
TOKEN_CHARS = 64
"""Characters that a token of a prompt may cover on average, unless the tokenizer has a longer token. Words have fewer;
a longer token is a run of one character, such as whitespace. Some tokenizers drop whitespace, or use one token for
any unknown word, so the longest token alone is no limit."""


@dataclass(kw_only=True, slots=True)
class _Choice:
    """One answer of a request."""

    stream: TextStream
    num_tokens: int = 0
    is_complete: bool = False
    logprobs: list[tuple[int, Json]] = field(default_factory=list[tuple[int, Json]])
    """Log-probabilities that wait for the text of their tokens, each with the place where that text begins."""

    def final_logprobs(self) -> list[Json]:
        """Return the log-probabilities of tokens whose text begins in the text so far; at the end of an answer that no
        stop sequence has ended, the rest too."""
        is_whole = self.is_complete and not self.stream.is_stopped
        final = [entry for begin, entry in self.logprobs if is_whole or begin < self.stream.num_final]
        self.logprobs = self.logprobs[len(final) :]
        return final


@dataclass(kw_only=True, slots=True)
class _Request:
    body: AnswerBody
    prompt_tokens: int
    choices: list[_Choice] = field(default_factory=list[_Choice])

    @property
    def is_complete(self) -> bool:
        return all(choice.is_complete for choice in self.choices)


class InferenceRequests:
    """The requests that a trainer answers now. All calls are made on every rank; `computes` is False on a rank whose
    leader computes alone."""

    def __init__(
        self,
        engine: Engine,
        directory: TrainerDirectory,
        send: Callable[[Json], None],
        *,
        text: Callable[[], BaseText],
        free_host_bytes: Callable[[], int],
    ) -> None:
        """send: sends an event to the worker. free_host_bytes: returns the free memory of this machine, of which the
        key-value cache of a CPU takes a part."""
        self.computes = engine.ranks.leads or engine.base.is_sharded
        self._engine = engine
        self._directory = directory
        self._send = send
        self._text = text
        self._free_host_bytes = free_host_bytes
        self._batch: ContinuousBatch | None = None
        self._requests: dict[str, _Request] = {}
        self._adapters: OrderedDict[str, FlatAdapter] = OrderedDict()
        """By digest, the most recently used last. The base model alone has the digest ""."""
        self._adapter_bytes = 0
        """Maximum memory of adapters, if some are not in use."""
        self._end_ids: dict[bool, frozenset[int]] = {}
        self._generations: dict[bool, Json] = {}

    @property
    def is_idle(self) -> bool:
        return not self._requests

    def add(self, body: AnswerBody) -> None:
        """Begin to answer a request, or report why that is impossible."""
        if not self.computes:
            return
        try:
            self._add(body)
        except (LoraCoreError, Refused, OSError) as error:
            self._fail(body["request_id"], error)
        except BrokenPass:
            raise  # the other ranks wait in the pass, so the trainer must exit
        except Exception as error:
            if is_device_fault(error):
                raise
            print_handled(error)
            self._fail(body["request_id"], Refused("inference_crashed", model=body["model"]))

    def remove(self, request_id: str) -> None:
        """Stop answering a request. Nothing more is reported for it."""
        request = self._requests.pop(request_id, None)
        if request is not None and self._batch is not None:
            for index in range(len(request.choices)):
                self._batch.remove(_name(request_id, index))
        if not self._requests:
            self._batch = None  # frees the key-value cache
            self._adapters.clear()

    def advance(self) -> None:
        """Compute the next token of each answer, and report the new text."""
        assert self._batch is not None
        try:
            tokens = self._batch.advance()
        except OutOfMemory as error:
            self._fail(error.job.rpartition("/")[0], error)
            return
        deltas: dict[str, list[Json]] = {}
        for new in tokens:
            request_id, _, index = new.name.rpartition("/")
            if request_id in self._requests:
                deltas.setdefault(request_id, []).extend(self._received(request_id, int(index), new))
        for request_id, of_request in deltas.items():
            self._report(request_id, of_request)

    def _add(self, body: AnswerBody) -> None:
        request_id, text = body["request_id"], self._text()
        _check_length(text, body, max_positions=self._engine.base.max_positions)
        prompts = _encoded(text, body)
        batch = self._new_batch() if self._batch is None else self._batch
        max_tokens = [self._max_tokens(ids, body["max_tokens"], batch) for ids in prompts]
        adapter = self._adapter_of(body)
        generation = self._generation(text, is_chat="messages" in body)
        request = _Request(body=body, prompt_tokens=sum(len(ids) for ids in prompts))
        self._requests[request_id] = request
        decode = partial(text.text_of, with_special=bool(body.get("tools")))
        for place, ids in enumerate(prompts):
            for _ in range(body["n"]):
                index = len(request.choices)
                context = () if "messages" in body else ids[-CONTEXT_TOKENS:]
                stream = TextStream(decode, prompt=context, stops=body["stop"])
                request.choices.append(_Choice(stream=stream))
                batch.add(
                    Prompt(
                        name=_name(request_id, index),
                        adapter=adapter,
                        ids=ids,
                        max_tokens=max_tokens[place],
                        end_ids=self._ends(text, is_chat="messages" in body),
                        sampling=_sampling(body, index),
                        has_low_priority=body.get("is_batch", False),
                    )
                )
        begun = {"type": "answering", "request_id": request_id, "prompt_tokens": request.prompt_tokens}
        self._send({**begun, "generation": generation})

    def _new_batch(self) -> ContinuousBatch:
        """Begin to answer requests, with limits of the memory. Ranks of a sharded base model need the same limits."""
        free_bytes = self._engine.free_bytes(host_bytes=self._free_host_bytes())
        if self._engine.base.is_sharded:
            free_bytes = min(self._engine.ranks.gathered(free_bytes))
        self._adapter_bytes = int(free_bytes * ADAPTER_SHARE)
        self._batch = self._engine.continuous_batch(cache_bytes=int(free_bytes * CACHE_SHARE))
        return self._batch

    def _adapter_of(self, body: AnswerBody) -> FlatAdapter:
        named = body["adapter"]
        digest = _digest(body)
        if named is None:
            self._adapters.setdefault("", self._engine.no_adapter())
        elif digest not in self._adapters:
            folder = self._directory.inside(named["folder"])
            assert folder is not None
            self._adapters[digest] = self._loaded(folder)
        self._adapters.move_to_end(digest)
        self._drop_unused(keeping=digest, max_bytes=self._adapter_bytes, max_number=CACHED_ADAPTERS)
        return self._adapters[digest]

    def _drop_unused(self, *, keeping: str | None = None, max_bytes: int = 0, max_number: int = 0) -> None:
        """Remove adapters that no request uses, the least recently used first, until both limits hold."""
        used = {keeping, *(_digest(request.body) for request in self._requests.values())}
        num_bytes = sum(adapter.num_bytes for adapter in self._adapters.values())
        for digest in [digest for digest in self._adapters if digest not in used]:
            if num_bytes <= max_bytes and len(self._adapters) <= max_number:
                return
            num_bytes -= self._adapters.pop(digest).num_bytes

    def _loaded(self, folder: Path) -> FlatAdapter:
        """Load an adapter. If memory runs out, the adapters that are kept for later requests are freed: on all ranks of
        a sharded base model, so that they keep the same ones. Raises LoraCoreError and OSError."""
        try:
            return self._load(folder)
        except LoraCoreError as error:  # the code and not the class, because another rank's error has only the code
            if error.code != OutOfMemory.code:
                raise
        self._drop_unused()
        try:
            return self._load(folder)
        except LoraCoreError as error:
            if error.code != OutOfMemory.code:
                raise
            raise Refused("adapter_out_of_memory") from error

    def _load(self, folder: Path) -> FlatAdapter:
        """Load an adapter, on all ranks of a sharded base model or on none."""
        with self._engine.ranks.sharing_errors() if self._engine.base.is_sharded else nullcontext():
            return self._engine.load_adapter(folder)

    def _max_tokens(self, ids: Sequence[int], wanted: int | None, batch: ContinuousBatch) -> int:
        """Return the maximum number of tokens of an answer. Raises Refused if the prompt leaves no space."""
        limits = (self._engine.base.max_positions, batch.max_sequence_tokens)
        longest = min((limit for limit in limits if limit is not None), default=None)
        if longest is None:
            return wanted or UNLIMITED_TOKENS
        is_sharded = longest != limits[0]
        prompt_tokens = len(ids)
        if wanted is not None and prompt_tokens + wanted > longest:
            raise Refused(
                "answer_too_long_when_sharded" if is_sharded else "answer_too_long",
                num_tokens=prompt_tokens,
                max_tokens=wanted,
                longest=longest,
            )
        if prompt_tokens >= longest:
            raise Refused(
                "prompt_too_long_when_sharded" if is_sharded else "prompt_too_long",
                num_tokens=prompt_tokens,
                longest=longest,
            )
        return wanted or longest - prompt_tokens

    def _ends(self, text: BaseText, *, is_chat: bool) -> frozenset[int]:
        if is_chat not in self._end_ids:
            self._end_ids[is_chat] = text.end_ids(as_chat=is_chat)
        return self._end_ids[is_chat]

    def _generation(self, text: BaseText, *, is_chat: bool) -> Json:
        """Return what another engine needs to render prompts and to end answers as this one, by kind of request.

        `text` has end_ids. `chat` also has template_kwargs, and is absent for a request without messages.
        """
        if is_chat not in self._generations:
            found: Json = {"text": {"end_ids": self._known_ends(text, is_chat=False)}}
            if is_chat:
                arguments = date_arguments(text.template)
                found["chat"] = {"end_ids": self._known_ends(text, is_chat=True), "template_kwargs": arguments}
            self._generations[is_chat] = found
        return self._generations[is_chat]

    def _known_ends(self, text: BaseText, *, is_chat: bool) -> list[int]:
        """Return the tokens that end an answer, without those that the base model can't generate."""
        return sorted(ident for ident in self._ends(text, is_chat=is_chat) if ident < self._engine.base.vocab_size)

    def _received(self, request_id: str, index: int, new: NewToken) -> list[Json]:
        """Return what the token adds to the answer: nothing, or one delta."""
        request = self._requests[request_id]
        choice = request.choices[index]
        if new.chosen is None:
            self._fail(request_id, Refused("logits_not_finite", model=request.body["model"]))
            return []
        choice.num_tokens += 1
        is_end = new.finish == "stop"
        if new.chosen.logprob is not None and not is_end:
            is_first = choice.num_tokens == 1 and "messages" in request.body
            choice.logprobs.append((choice.stream.num_decoded, self._logprob(new.chosen, is_first=is_first)))
        piece = "" if is_end else choice.stream.push(new.chosen.token)
        if new.finish is not None:
            piece += choice.stream.finish()
        finish = "stop" if choice.stream.is_stopped else new.finish
        if finish is not None:
            choice.is_complete = True
            if new.finish is None and self._batch is not None:
                self._batch.remove(new.name)
        delta: Json = {"index": index, "text": piece, "num_tokens": choice.num_tokens}
        if logprobs := choice.final_logprobs():
            delta["logprobs"] = logprobs
        if finish is not None:
            delta["finish"] = finish
        return [delta] if len(delta) > 3 or piece else []

    def _logprob(self, chosen: ChosenToken, *, is_first: bool) -> Json:
        """Return a token's log-probability. is_first: its text begins the decoded text."""
        assert chosen.logprob is not None
        top = [self._token(token, logprob, is_first=is_first) for token, logprob in chosen.alternatives]
        return {**self._token(chosen.token, chosen.logprob, is_first=is_first), "top_logprobs": top}

    def _token(self, token: int, logprob: float, *, is_first: bool) -> Json:
        text = self._text().token_text(token, is_first=is_first)
        is_whole = INCOMPLETE not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}

    def _report(self, request_id: str, deltas: list[Json]) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return  # it has failed
        counted = {"request_id": request_id, "completion_tokens": sum(one.num_tokens for one in request.choices)}
        for some in _of_events(deltas):
            self._send({"type": "generated", "deltas": some, **counted})
        if request.is_complete:
            self._send({"type": "answered", **counted})
            self.remove(request_id)

    def _fail(self, request_id: str, error: LoraCoreError | Refused | OSError) -> None:
        self.remove(request_id)
        if isinstance(error, OutOfMemory):  # its message is about a job
            error = Refused("answer_out_of_memory")
        self._send({"type": "unanswered", "request_id": request_id, "error": error_report(error)})


class TimeShare:
    """Divides the time of a trainer between training and inference while both have work."""

    TRAINING_SHARE = 0.5

    def __init__(self) -> None:
        self._owed = 0.0
        """Seconds by which training is behind its share, without those of `_prepared`."""
        self._prepared = 0.0
        """Seconds of preparation that training has not got back."""

    def is_training_next(self) -> bool:
        return self._owed + self._prepared >= 0

    def spent(self, *, training: float = 0.0, inference: float = 0.0, preparation: float = 0.0) -> None:
        """Record seconds. A debt is limited to the last turn, so that neither side waits for long.

        preparation: of inference, before an answer begins. Training gets all of it back, in as many turns as that
        takes, because one long prompt may take longer than many ticks.
        """
        if training:
            allowed = training * (1 - self.TRAINING_SHARE) / self.TRAINING_SHARE
            self._prepared, allowed = max(0.0, self._prepared - allowed), max(0.0, allowed - self._prepared)
            self._owed = -allowed
        self._owed += inference
        self._prepared += preparation

    def measure(self, act: Callable[[], None], kind: Literal["training", "inference", "preparation"]) -> None:
        """Do something, and record its duration."""
        began_at = time.monotonic()
        act()
        self.spent(**{kind: time.monotonic() - began_at})


def _of_events(deltas: Sequence[Json]) -> Iterator[list[Json]]:
    """Split the deltas into events, none of which has log-probabilities of more than EVENT_LOGPROBS tokens.

    A delta with more of them is split: its text is in its first part, its end in its last one.
    """
    some: list[Json] = []
    num_logprobs = 0
    for part in chain.from_iterable(map(_parts, deltas)):
        added = len(part.get("logprobs", ()))
        if some and num_logprobs + added > EVENT_LOGPROBS:
            yield some
            some, num_logprobs = [], 0
        some.append(part)
        num_logprobs += added
    if some:
        yield some


def _parts(delta: Json) -> list[Json]:
    logprobs = delta.get("logprobs", ())
    if len(logprobs) <= EVENT_LOGPROBS:
        return [delta]
    parts: list[Json] = [
        {**delta, "text": "", "logprobs": logprobs[start : start + EVENT_LOGPROBS]}
        for start in range(0, len(logprobs), EVENT_LOGPROBS)
    ]
    parts[0]["text"] = delta["text"]
    for part in parts[:-1]:
        part.pop("finish", None)
    return parts


def _digest(body: AnswerBody) -> str:
    return "" if body["adapter"] is None else body["adapter"]["digest"]


def _check_length(text: BaseText, body: AnswerBody, *, max_positions: int | None) -> None:
    """Raise Refused if a prompt can't fit. Its characters are counted, because to tokenize a very long prompt would
    delay training for seconds."""
    num_chars = max(map(_num_chars, _prompts(body)), default=0)
    if max_positions is None or num_chars <= max_positions * TOKEN_CHARS:
        return
    most = max_positions * max(TOKEN_CHARS, text.longest_token)
    if num_chars > most:
        raise Refused("prompt_text_too_long", num_chars=num_chars, longest=max_positions, most=most)


def prompt_chars(body: AnswerBody) -> int:
    """Return the number of characters of all prompts of a request."""
    return sum(map(_num_chars, _prompts(body)))


def _prompts(body: AnswerBody) -> list[object]:
    return [[body["messages"], body.get("tools")]] if "messages" in body else [*body.get("prompts", ())]


def _num_chars(prompt: object) -> int:
    """Return the number of characters of all texts in messages and tools, or of a text."""
    total, left = 0, [prompt]
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            left += chain.from_iterable(cast(dict[str, object], one).items())
        elif isinstance(one, list):
            left += cast(list[object], one)
    return total


def _encoded(text: BaseText, body: AnswerBody) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt. Raises Refused."""
    if "messages" in body:
        return [text.chat_ids(Chat(body["messages"], body.get("tools")))]
    return [text.prompt_ids(prompt, as_chat=False) for prompt in body.get("prompts", ())]


def _sampling(body: AnswerBody, index: int) -> Sampling:
    return Sampling(
        temperature=body["temperature"],
        top_p=body["top_p"],
        seed=body["seed"] + index,
        presence_penalty=body["presence_penalty"],
        frequency_penalty=body["frequency_penalty"],
        num_alternatives=body["num_logprobs"],
    )


def _name(request_id: str, index: int) -> str:
    return f"{request_id}/{index}"
