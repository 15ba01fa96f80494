# pyright: strict
"""Holds the keys and values of the tokens that a sequence already has, in generation.

Shape suffixes: K key heads, n new tokens, E head features, C attention calls of a pass.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
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
    _addresses_C4: NDArray[np.int64] | None = None
    """None if a buffer has changed since."""

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
        call, stop = self.next_call(), self.num_tokens + k_KnE.shape[1]
        if call == len(self._of_calls):
            self._of_calls.append((self._grown(k_KnE, None, stop), self._grown(v_KnE, None, stop)))
        elif stop > self._of_calls[call][0].shape[1]:
            keys, values = self._of_calls[call]
            self._of_calls[call] = self._grown(k_KnE, keys, stop), self._grown(v_KnE, values, stop)
        return self._of_calls[call]

    def next_call(self) -> int:
        """Return the number of the next attention call, which takes place."""
        self._next_call += 1
        return self._next_call - 1

    def addresses(self) -> NDArray[np.int64]:
        """Return int64 [C, 4] for kernels that append one token: for each attention call the addresses of keys and of
        values, their capacity, and the number of tokens so far.

        Call it between two passes. The buffers grow first if they are full.
        """
        table_C4 = self._addresses_C4
        if table_C4 is None or (table_C4[:, 2] == self.num_tokens).any():
            self.begin_pass()
            buffers = [self.reserved(keys[:, :1], values[:, :1]) for keys, values in tuple(self._of_calls)]
            self.begin_pass()
            rows = [(address_of(keys), address_of(values), keys.shape[1], 0) for keys, values in buffers]
            self._addresses_C4 = table_C4 = np.array(rows, np.int64).reshape(-1, 4)
        table_C4[:, 3] = self.num_tokens
        return table_C4

    def _grown(self, like_KnE: Tensor, old: Tensor | None, num_tokens: int) -> Tensor:
        """Return a buffer for at least `num_tokens` tokens that begins with those of the old one."""
        self._addresses_C4 = None
        capacity = min(-(-num_tokens // GROWTH_TOKENS) * GROWTH_TOKENS, self.max_tokens)
        buffer = like_KnE.new_empty(len(like_KnE), capacity, like_KnE.shape[2])
        if old is not None:
            buffer[:, : self.num_tokens] = old[:, : self.num_tokens]
        return buffer


def address_of(tensor: Tensor) -> int:
    return tensor.data_ptr()
