# pyright: basic
"""Keys and values of a growing sequence, kept so that each further token is a pass of that token alone.

Letters: H query heads, K key heads, G = H / K, S tokens so far, n new ones, E head features. What is kept, and what is
computed from it, is one sequence's own: no other that is answered in the same pass can be seen in it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class KeptKeys:
    """Of one sequence, for each call of attention in a pass, in their order: [K, capacity, E] each.

    A pass writes behind `num_tokens`, which is raised when it has succeeded: one that failed can be made again.
    """

    capacity: int
    num_tokens: int = 0
    _of_calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _next_call: int = 0

    def begin_pass(self) -> None:
        self._next_call = 0

    def extended(self, k_KnE: Tensor, v_KnE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, the new ones among them."""
        if self._next_call == len(self._of_calls):
            rooms = (part.new_empty(len(part), self.capacity, part.shape[2]) for part in (k_KnE, v_KnE))
            self._of_calls.append((next(rooms), next(rooms)))
        kept = self._of_calls[self._next_call]
        self._next_call += 1
        stop = self.num_tokens + k_KnE.shape[1]
        for room, new in zip(kept, (k_KnE, v_KnE), strict=True):
            room[:, self.num_tokens : stop] = new
        return kept[0][:, :stop], kept[1][:, :stop]


def attend_last(
    q_H1E: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[H, 1, E]: what the last token sees of itself and those before it, of `window` at most."""
    if window is not None:
        k_KSE, v_KSE = k_KSE[:, -window:], v_KSE[:, -window:]
    q_KGE = q_H1E.reshape(len(k_KSE), -1, q_H1E.shape[2])
    scores_KGS = torch.bmm(q_KGE, k_KSE.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores_KGS = torch.tanh(scores_KGS / softcap) * softcap
    weights_KGS = torch.softmax(scores_KGS, dim=-1).to(v_KSE.dtype)
    return torch.bmm(weights_KGS, v_KSE).reshape(len(q_H1E), 1, -1)
