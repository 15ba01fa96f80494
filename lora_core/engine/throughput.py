# pyright: strict
"""Tokens a second by the size of a tick, learnt from the ticks as they come: of one job, and of several at once.

A size is counted in tokens as they are chosen for a tick, and as products see them. A second's work is counted in
tokens through the whole base: where slices enter above kept prefixes there is less to compute, and it goes no faster.
"""

from dataclasses import dataclass
from typing import Literal

Company = Literal["alone", "together"]
NEWEST_COUNTS = 0.2
"""Share of the newest tick in an average."""
COLD_TICKS = 1
"""Of each size: the first one also pays for memory and kernels that it is the first to touch."""


@dataclass(kw_only=True, slots=True)
class Seen:
    """Averages over the ticks of about one size."""

    num_ticks: int = 0
    num_tokens: float = 0.0
    tokens_per_second: float = 0.0

    def learn(self, num_tokens: int, tokens_per_second: float) -> None:
        share = NEWEST_COUNTS if self.num_ticks > COLD_TICKS else 1.0
        self.num_ticks += 1
        self.num_tokens += share * (num_tokens - self.num_tokens)
        self.tokens_per_second += share * (tokens_per_second - self.tokens_per_second)


class TickSpeeds:
    """Sizes are told apart by powers of two."""

    def __init__(self) -> None:
        self._seen: dict[Company, dict[int, Seen]] = {"alone": {}, "together": {}}

    def learn(self, *, num_tokens: int, cost: int, num_jobs: int, seconds: float) -> None:
        """cost: tokens through the whole base that take about as long as these `num_tokens`."""
        seen = self._seen["alone" if num_jobs == 1 else "together"].setdefault(num_tokens.bit_length(), Seen())
        seen.learn(num_tokens, cost / seconds)

    def num_alone(self, num_tokens: int) -> int:
        """Ticks of one job so far, of about this size."""
        return self._seen["alone"].get(num_tokens.bit_length(), Seen()).num_ticks

    def table(self) -> dict[Company, list[tuple[int, float]]]:
        """(tokens, tokens a second), by size; without the sizes of which only cold ticks were seen."""
        return {
            company: [
                (round(seen.num_tokens), round(seen.tokens_per_second, 1))
                for _, seen in sorted(by_size.items())
                if seen.num_ticks > COLD_TICKS
            ]
            for company, by_size in self._seen.items()
        }
