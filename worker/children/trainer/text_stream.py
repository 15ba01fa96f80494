"""Decodes an answer while its tokens arrive. A piece of text is returned once no later token can change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Text that a tokenizer returns for the first bytes of a character."""
MAX_PENDING = 64
"""Number of tokens without new text after which they are not decoded again with all later ones. Otherwise the time of
an answer that shows no text would grow with the square of its length."""
MAX_INCOMPLETE = 3
"""Maximum number of bytes of a character that is not complete. Some tokenizers return INCOMPLETE for each."""


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
        """The tokens that are decoded together with a new one: those of the last text, and the pending ones."""
        self._num_decoded = len(self._ids)
        """Number of these tokens that are not pending."""
        self._num_shown = len(decode(self._ids))
        """Number of characters of their text that were passed on."""
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
        text = self._decode(self._ids)
        if text.endswith(INCOMPLETE):
            self._num_shown = min(self._num_shown, len(text))  # invalid text may become shorter
        elif len(text) > self._num_shown:
            return self._advance(text)
        return self._shortened(text) if len(self._ids) - self._num_decoded >= MAX_PENDING else ""

    def _shortened(self, text: str) -> str:
        """Discard pending tokens without any text, such as special tokens. If more are left than the start of a
        character has, each token ends within a character, or the text is invalid: pass on the text before that."""
        pending = self._ids[self._num_decoded :]
        # Twice, because a decoder may drop the whitespace at the start of a text.
        self._ids[self._num_decoded :] = [token for token in pending if self._decode([token, token])]
        return self._advance(text) if len(self._ids) - self._num_decoded > MAX_INCOMPLETE else ""

    def _advance(self, text: str) -> str:
        """Pass on the text, except the start of a character, and keep only the pending tokens as context."""
        most = MAX_INCOMPLETE if text.endswith(INCOMPLETE) else 0
        num_incomplete = min(most, len(text) - len(text.rstrip(INCOMPLETE)))
        shown = text[self._num_shown : len(text) - num_incomplete]
        del self._ids[: self._num_decoded]
        self._num_decoded = len(self._ids)
        self._num_shown = len(self._decode(self._ids)) - num_incomplete
        return self._final(shown)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        if self.is_stopped:
            return ""
        text = self._final(self._decode(self._ids)[self._num_shown :])
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
