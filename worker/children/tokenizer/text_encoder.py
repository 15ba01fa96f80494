"""What preparation knows of a base model: how it writes a row as text, and the text as tokens.

A row of messages goes through the base's chat template, which says where tokens begin and end. Plain text has
what the tokenizer puts around a text by its own convention, and the base's end-of-text token behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from catalog.datasets.chat import ChatMessage, only_last_learnt
from catalog.datasets.formats import DataKind
from catalog.datasets.rows import Completion, as_chat
from catalog.spec.data import Loss
from worker.children.tokenizer.chat_template import ChatTemplate, Refused, Rendered, special_tokens


class BaseText:
    """One base's tokenizer and chat template."""

    def __init__(self, base_dir: Path) -> None:
        content = (base_dir / "tokenizer.json").read_bytes()
        self._base_dir = base_dir
        self._tokenizer = Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens, config = special_tokens(base_dir), _read_json(base_dir / "config.json")
        self.eos = _end_of_text(self._tokenizer, tokens, config)
        """(id, text) of the token that ends a text; None where the base has none."""
        self.digest = sha256(content).hexdigest()
        self._num_ids: int | None = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        added = cast(dict[int, Any], self._tokenizer.get_added_tokens_decoder())
        self.special = np.array(sorted(ident for ident, token in added.items() if token.special), dtype=np.int64)

    @cached_property
    def template(self) -> ChatTemplate:
        """Only rows of messages need it. Raises Refused where the base has none."""
        return ChatTemplate.load(self._base_dir)

    @property
    def used_template(self) -> ChatTemplate | None:
        """The template, if a row has needed it."""
        return self.__dict__.get("template")

    @property
    def opens_with(self) -> str | None:
        """What the tokenizer puts before a plain text; None where it puts nothing there."""
        encoding = self._tokenizer.encode("a")
        mask = encoding.special_tokens_mask
        before = encoding.tokens[: mask.index(0)] if 0 in mask else []
        return "".join(before) or None

    def render(self, kind: DataKind, row: Any, *, loss: Loss) -> Rendered:
        """A row as its kind's `check` gave it. Raises Refused."""
        if kind == "chat":
            return self.template.render_supervised(only_last_learnt(row) if loss == "last_turn" else row)
        if kind == "text":
            return Rendered(text=row, spans=((0, len(row)),), is_plain=True)
        completion = cast(Completion, row)
        if isinstance(completion["completion"], list):
            return self.template.render_supervised(as_chat(completion))
        prompt = cast(str, completion["prompt"])
        text = prompt + completion["completion"]
        return Rendered(text=text, spans=((len(prompt), len(text)),), is_plain=True)

    def encode(self, rows: list[Rendered]) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """(ids, mask) of each row; mask 1 for what is learnt. Raises Refused for a token that the base lacks."""
        found: list[tuple[NDArray[np.int64], NDArray[np.uint8]]] = []
        for is_plain, group in groupby(rows, key=lambda row: row.is_plain):
            alike = list(group)
            encodings = self._tokenizer.encode_batch([row.text for row in alike], add_special_tokens=is_plain)
            for row, encoding in zip(alike, encodings, strict=True):
                found.append(self._plain(row, encoding) if is_plain else self._turns(row, encoding))
        for ids, _ in found:
            self._check(ids)
        return found

    def prompt_ids(self, prompt: str, *, as_chat: bool) -> tuple[int, ...]:
        """A prompt up to where an answer begins. Raises Refused."""
        if as_chat:
            text = self.template.render([ChatMessage(role="user", content=prompt)], add_generation_prompt=True)
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        ids = self._tokenizer.encode(prompt).ids
        return tuple(ids[:-1] if self.eos is not None and ids and ids[-1] == self.eos[0] else ids)

    def end_ids(self, *, as_chat: bool) -> frozenset[int]:
        """Tokens after which an answer is over: the end of a text, and the end of an assistant's turn."""
        ends = {self.eos[0]} if self.eos is not None else set[int]()
        if as_chat:
            turns = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
            rendered = self.template.render_supervised(turns)
            ids, mask = self._turns(rendered, self._tokenizer.encode(rendered.text, add_special_tokens=False))
            last = ids[np.flatnonzero(mask)[-1:]]
            ends |= {int(ident) for ident in last if ident in self.special}
        return frozenset(ends)

    def text_of(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, row: Rendered, *, num_tokens: int) -> list[str]:
        """The text of each token as `encode` gave them: joined they are the row's text, and around it what the
        tokenizer has added. A character of several tokens stands with its first."""
        encoding = self._tokenizer.encode(row.text, add_special_tokens=row.is_plain)
        found: list[str] = []
        upto = 0
        for ident, (_, end), is_added in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True):
            added = self._tokenizer.id_to_token(ident) or "" if is_added and end <= upto else ""
            found.append(row.text[upto:end] if end > upto else added)
            upto = max(upto, end)
        if len(found) < num_tokens and self.eos is not None:
            found.append(self.eos[1])
        return found

    def _turns(self, row: Rendered, encoding: Encoding) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        ids = np.array(encoding.ids, dtype=np.int64)
        return ids, _mask(ids, encoding, row, self.special, trims=not self.template.marks_spans)

    def _plain(self, row: Rendered, encoding: Encoding) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The end of the text is learnt with it, and stands there once.

        What is learnt begins with the first token that reaches into it. By offsets alone a token of white space
        could not be told to be inside: some tokenizers give it none.
        """
        ids = np.array(encoding.ids, dtype=np.int64)
        ((start, _),) = row.spans
        first = next((index for index, (_, end) in enumerate(encoding.offsets) if end > start), len(ids))
        mask = (np.arange(len(ids)) >= max(1, first if start else 0)).astype(np.uint8)
        if self.eos is not None and len(ids):
            if ids[-1] != self.eos[0]:
                ids, mask = np.append(ids, self.eos[0]), np.append(mask, np.uint8(1))
            mask[-1] = len(ids) > 1
        return ids, mask

    def _check(self, ids: NDArray[np.int64]) -> None:
        if self._num_ids is not None and len(ids) and int(ids.max()) >= self._num_ids:
            raise Refused(
                "tokenizer_exceeds_base",
                f"The base's tokenizer gave the token {int(ids.max())}, and the base knows {self._num_ids} of them.",
                "Add the base again with the tokenizer that it was trained with.",
            )


def _end_of_text(tokenizer: Tokenizer, tokens: Mapping[str, str], config: Mapping[str, Any]) -> tuple[int, str] | None:
    """As the tokenizer's configuration names it, else the model's."""
    text = tokens.get("eos_token")
    ident = tokenizer.token_to_id(text) if text else None
    if text is not None and ident is not None:
        return ident, text
    given: Any = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ident = next(iter(cast(list[Any], given)), None) if isinstance(given, list) else given
    text = tokenizer.id_to_token(ident) if type(ident) is int else None
    return None if text is None else (cast(int, ident), text)


def _mask(
    ids: NDArray[np.int64], encoding: Encoding, rendered: Rendered, special: NDArray[np.int64], *, trims: bool
) -> NDArray[np.uint8]:
    """1 for each token that overlaps an answer, but never for a row's first: nothing predicts it.

    trims: end an answer at its end-of-turn token, leaving the white space that a template puts after it.
    """
    mask = np.zeros(len(ids), dtype=np.uint8)
    if not len(ids):
        return mask
    starts, ends = np.array(encoding.offsets, dtype=np.int64).T
    is_special = np.isin(ids, special)
    for start, stop in rendered.spans:
        inside = np.flatnonzero((starts < stop) & (ends > start))
        marks = inside[is_special[inside]]
        if trims and len(marks) and not rendered.text[ends[marks[-1]] : stop].strip():
            inside = inside[inside <= marks[-1]]
        mask[inside] = 1
    mask[0] = 0
    return mask


def _read_json(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(path.read_text("utf-8"))) if path.is_file() else {}
