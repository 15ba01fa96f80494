"""Decodes an answer while its tokens arrive. A piece of text is returned once no later token can change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Text that a tokenizer returns for the first bytes of a character."""


class TextStream:
    """Decodes the tokens of one answer, and ends the text before the stop sequence that is complete first.

    So the text does not depend on how tokens divide it.
    Some tokenizers decode a token differently at the start of a text. Therefore the answer is decoded after the last
    tokens of its prompt.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], *, prompt: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self.is_stopped = False
        """A stop sequence has ended the text. Later tokens are ignored."""
        self.num_final = 0
        """Number of characters that were returned."""
        self._decode = decode
        self._ids = list(prompt)
        self._first = 0
        """Start of the tokens that are decoded together with new ones."""
        self._num_decoded = len(self._ids)
        self._stops = [stop for stop in stops if stop]
        self._held: str = ""
        """Text that may be the start of a stop sequence."""

    @property
    def num_decoded(self) -> int:
        """Number of characters that were returned or are held."""
        return self.num_final + len(self._held)

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is now final."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._first : self._num_decoded])
        text = self._decode(self._ids[self._first :])
        if len(text) <= len(before) or text.endswith(INCOMPLETE):
            return ""
        self._first, self._num_decoded = self._num_decoded, len(self._ids)
        return self._final(text[len(before) :])

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        if self.is_stopped:
            return ""
        before = self._decode(self._ids[self._first : self._num_decoded])
        text = self._final(self._decode(self._ids[self._first :])[len(before) :])
        held, self._held = self._held, ""
        self.num_final += len(held)
        return text + held

    def _final(self, text: str) -> str:
        """Append text. Returns what can't belong to a stop sequence any more."""
        text = self._held + text
        found = [(index + len(stop), index) for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            num_final, self._held = min(found)[1], ""
        else:
            num_final = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[num_final:]
        self.num_final += num_final
        return text[:num_final]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
