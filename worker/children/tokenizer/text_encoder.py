"""Encodes rows for a base model: it renders a row as text, and tokenizes the text.

The base model's chat template renders a row of messages, including all special tokens. Plain text gets the special
tokens that the tokenizer adds by default, and the base model's end-of-text token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from catalog.datasets.chat import Chat, only_last_trained
from catalog.datasets.formats import DataKind
from catalog.datasets.messages import ChatMessage
from catalog.datasets.rows import Completion, as_chat
from catalog.spec.data import Loss
from worker.children.tokenizer.chat_template import ChatTemplate, Refused, Rendered, read_optional_json, special_tokens


class BaseText:
    """The tokenizer and chat template of one base model."""

    def __init__(self, base_dir: Path) -> None:
        content = (base_dir / "tokenizer.json").read_bytes()
        self._base_dir = base_dir
        self._tokenizer = Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens, config = special_tokens(base_dir), read_optional_json(base_dir / "config.json")
        self.eos = _end_of_text(self._tokenizer, tokens, config)
        """(id, text) of the token that ends a text. None if the base model has none."""
        self.digest = sha256(content).hexdigest()
        self._num_ids: int | None = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        added = cast(dict[int, Any], self._tokenizer.get_added_tokens_decoder())
        self.special = np.array(sorted(ident for ident, token in added.items() if token.special), dtype=np.int64)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, which only rows of messages need. Raises Refused if the base model has none."""
        return ChatTemplate.load(self._base_dir)

    @cached_property
    def tool_template(self) -> ChatTemplate:
        """The chat template for conversations with tools. Raises Refused if the base model has none."""
        return ChatTemplate.load_tool_use(self._base_dir) or self.template

    def template_of(self, chat: Chat) -> ChatTemplate:
        """Return the template that renders a conversation, as transformers selects it. Raises Refused."""
        return self.tool_template if chat.tools else self.template

    @property
    def used_templates(self) -> list[ChatTemplate]:
        """The templates that rows have used, the default one first."""
        used = (self.__dict__.get(name) for name in ("template", "tool_template"))
        return list(dict.fromkeys(template for template in used if template is not None))

    @property
    def opens_with(self) -> str | None:
        """The text that the tokenizer adds before a plain text. None if it adds nothing."""
        encoding = self._tokenizer.encode("a")
        mask = encoding.special_tokens_mask
        before = encoding.tokens[: mask.index(0)] if 0 in mask else []
        return "".join(before) or None

    def render(self, kind: DataKind, row: Any, *, loss: Loss) -> Rendered:
        """Render a row that its kind's `check` has returned. Raises Refused."""
        if kind == "chat":
            chat = cast(Chat, row)
            chat = only_last_trained(chat) if loss == "last_turn" else chat
            return self.template_of(chat).render_supervised(chat)
        if kind == "text":
            return Rendered(text=row, spans=((0, len(row)),), is_plain=True)
        completion = cast(Completion, row)
        if isinstance(completion["completion"], list):
            chat = as_chat(completion)
            return self.template_of(chat).render_supervised(chat)
        prompt = cast(str, completion["prompt"])
        text = prompt + completion["completion"]
        return Rendered(text=text, spans=((len(prompt), len(text)),), is_plain=True)

    def encode(self, rows: list[Rendered]) -> list[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Return (ids, mask) of each row, with mask 1 for trained tokens. Raises Refused for a token that the base
        model lacks."""
        found: list[tuple[NDArray[np.int64], NDArray[np.uint8]]] = []
        for is_plain, group in groupby(rows, key=lambda row: row.is_plain):
            batch = list(group)
            encodings = self._tokenizer.encode_batch([row.text for row in batch], add_special_tokens=is_plain)
            for row, encoding in zip(batch, encodings, strict=True):
                found.append(self._plain(row, encoding) if is_plain else self._turns(row, encoding))
        for ids, _ in found:
            self._check(ids)
        return found

    def prompt_ids(self, prompt: str, *, as_chat: bool) -> tuple[int, ...]:
        """Return the tokens of a prompt up to the start of the answer. Raises Refused."""
        if as_chat:
            return self.chat_ids(Chat([ChatMessage(role="user", content=prompt)]))
        ids = self._tokenizer.encode(prompt).ids
        return tuple(ids[:-1] if self.eos is not None and ids and ids[-1] == self.eos[0] else ids)

    def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the start of the next answer. Raises Refused."""
        text = self.template_of(chat).render_prompt(chat)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def end_ids(self, *, as_chat: bool) -> frozenset[int]:
        """Return the tokens that end an answer: the end of a text, those of generation_config.json, and the end of an
        assistant turn."""
        ends = _generation_ends(self._base_dir)
        if self.eos is not None:
            ends.add(self.eos[0])
        return frozenset(ends | self.turn_ends()) if as_chat else frozenset(ends)

    def turn_ends(self) -> set[int]:
        """Return the special token that ends an assistant turn. Empty if the template ends it with text. Raises
        Refused."""
        turns = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
        rendered = self.template.render_supervised(Chat(turns))
        ids, mask = self._turns(rendered, self._tokenizer.encode(rendered.text, add_special_tokens=False))
        last = ids[np.flatnonzero(mask)[-1:]]
        return {int(ident) for ident in last if ident in self.special}

    def text_of(self, ids: Sequence[int], *, with_special: bool = False) -> str:
        """Decode tokens to text. with_special: with special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not with_special)

    def token_text(self, ident: int, *, is_first: bool) -> str:
        """Decode one token, including a special one. is_first: at the start of a text, where some tokenizers drop a
        leading space."""
        before = [] if is_first else self._letter
        text = self._tokenizer.decode([*before, ident], skip_special_tokens=False)
        return text[len(self._tokenizer.decode(before, skip_special_tokens=False)) :]

    @cached_property
    def longest_token(self) -> int:
        """Maximum number of characters of a token. For byte-level tokens, of its bytes, which are no fewer."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=0)

    @cached_property
    def _letter(self) -> list[int]:
        """Tokens of a text after which any token may follow."""
        return self._tokenizer.encode("a", add_special_tokens=False).ids

    def pieces(self, row: Rendered, *, num_tokens: int) -> list[str]:
        """Return the text of each token that `encode` returns. Joined, they are the row's text and the special tokens
        that the tokenizer has added. A character of several tokens belongs to the first of them."""
        encoding = self._tokenizer.encode(row.text, add_special_tokens=row.is_plain)
        found: list[str] = []
        position = 0
        for ident, (_, end), is_added in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True):
            added = self._tokenizer.id_to_token(ident) or "" if is_added and end <= position else ""
            found.append(row.text[position:end] if end > position else added)
            position = max(position, end)
        if len(found) < num_tokens and self.eos is not None:
            found.append(self.eos[1])
        return found

    def _turns(self, row: Rendered, encoding: Encoding) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        ids = np.array(encoding.ids, dtype=np.int64)
        return ids, _mask(ids, encoding, row, self.special, trims=not row.is_marked)

    def _plain(self, row: Rendered, encoding: Encoding) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return (ids, mask) of plain text. The end-of-text token occurs once, and is trained on.

        The trained tokens begin with the first token that overlaps the trained text, and continue to the end. Offsets
        can't be used for each token, because some tokenizers give whitespace no offsets.
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
            raise Refused("tokenizer_exceeds_base", token_id=int(ids.max()), num_ids=self._num_ids)


def _end_of_text(tokenizer: Tokenizer, tokens: Mapping[str, str], config: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the end-of-text token of the tokenizer's configuration, or else of the model's."""
    text = tokens.get("eos_token")
    ident = tokenizer.token_to_id(text) if text else None
    if text is not None and ident is not None:
        return ident, text
    given: Any = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ident = next(iter(cast(list[Any], given)), None) if isinstance(given, list) else given
    text = tokenizer.id_to_token(ident) if type(ident) is int else None
    return None if text is None else (cast(int, ident), text)


def _generation_ends(base_dir: Path) -> set[int]:
    """Return eos_token_id of generation_config.json, which is an id, a list of ids, or absent."""
    given: Any = read_optional_json(base_dir / "generation_config.json").get("eos_token_id")
    listed = cast(list[Any], given if isinstance(given, list) else [given])
    return {ident for ident in listed if type(ident) is int}


def _mask(
    ids: NDArray[np.int64], encoding: Encoding, rendered: Rendered, special: NDArray[np.int64], *, trims: bool
) -> NDArray[np.uint8]:
    """Return a mask with 1 for each token that overlaps an answer, except the first token of a row, which nothing
    predicts.

    trims: end an answer at its end-of-turn token, without the whitespace that a template adds after it.
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
