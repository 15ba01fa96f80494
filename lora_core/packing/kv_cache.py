# pyright: strict
"""The keys and values of the tokens that a sequence already has, in generation.

Shape suffixes: K key heads, n new tokens, E head features.
"""

from dataclasses import dataclass, field

from torch import Tensor

GROWTH_TOKENS = 256
"""Tokens by which a key-value cache grows at a time."""


@dataclass(kw_only=True, slots=True)
class SequenceCache:
    """Key-value cache of one sequence: for each attention call of a pass, in order, keys and values [K, capacity, E].

    The capacity grows with the sequence, up to `max_tokens`. A pass writes after the first `num_tokens` tokens. The
    caller raises `num_tokens` only after the pass succeeded, so a failed pass can be repeated.
    """

    max_tokens: int
    num_tokens: int = 0
    _of_calls: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    _next_call: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token in all attention calls. 0 before the first pass."""
        return sum(buffer[:, :1].nbytes for buffers in self._of_calls for buffer in buffers)

    def begin_pass(self) -> None:
        self._next_call = 0

    def extended(self, k_KnE: Tensor, v_KnE: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [K, n, E] of new tokens. Return those of all tokens, as views."""
        stop = self.num_tokens + k_KnE.shape[1]
        buffers = self.reserved(k_KnE, v_KnE)
        for buffer, new in zip(buffers, (k_KnE, v_KnE), strict=True):
            buffer[:, self.num_tokens : stop] = new
        return buffers[0][:, :stop], buffers[1][:, :stop]

    def reserved(self, k_KnE: Tensor, v_KnE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buffers of the next attention call, with space for these new keys and values [K, n, E]."""
        call, stop = self._next_call, self.num_tokens + k_KnE.shape[1]
        self._next_call += 1
        if call == len(self._of_calls):
            self._of_calls.append((self._grown(k_KnE, None, stop), self._grown(v_KnE, None, stop)))
        elif stop > self._of_calls[call][0].shape[1]:
            keys, values = self._of_calls[call]
            self._of_calls[call] = self._grown(k_KnE, keys, stop), self._grown(v_KnE, values, stop)
        return self._of_calls[call]

    def _grown(self, like_KnE: Tensor, old: Tensor | None, num_tokens: int) -> Tensor:
        """Return a buffer for at least `num_tokens` tokens that begins with those of the old one."""
        capacity = min(-(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS, self.max_tokens)
        buffer = like_KnE.new_empty(len(like_KnE), capacity, like_KnE.shape[2])
        if old is not None:
            buffer[:, : self.num_tokens] = old[:, : self.num_tokens]
        return buffer
