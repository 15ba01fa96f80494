# pyright: strict
"""Measures the speed of ticks: averages of the engine and of its fullest lane, and a table by tick size."""

from dataclasses import dataclass
from typing import Literal

PackSize = Literal["alone", "together"]
NEWEST_SHARE = 0.2
"""Weight of the newest tick in an average."""
COLD_TICKS = 1
"""Ticks of each size that are not averaged, since the first one also pays for allocation and kernel loading."""


@dataclass(kw_only=True, slots=True)
class SizeAverage:
    """Averages over ticks of similar size."""

    num_ticks: int = 0
    num_tokens: float = 0.0
    tokens_per_second: float = 0.0

    def add(self, num_tokens: int, tokens_per_second: float) -> None:
        share = NEWEST_SHARE if self.num_ticks > COLD_TICKS else 1.0
        self.num_ticks += 1
        self.num_tokens += share * (num_tokens - self.num_tokens)
        self.tokens_per_second += share * (tokens_per_second - self.tokens_per_second)


class Throughput:
    """Averages over the training ticks of one engine. Two ticks have the same size if their token counts have the same
    bit length."""

    def __init__(self) -> None:
        self._num_warm = 0
        self.tokens_per_second = 0.0
        """Tokens through the base model per second of tick time. 0 before the first tick."""
        self.lane_tokens_per_second = 0.0
        """The same for the fullest lane alone. 0 before the first tick."""
        self._by_size: dict[PackSize, dict[int, SizeAverage]] = {"alone": {}, "together": {}}

    def record(self, *, num_tokens: int, fullest_lane: int, num_jobs: int, seconds: float) -> None:
        """Record one tick. `fullest_lane` is the number of tokens of the lane that had the most."""
        of_size = self._by_size["alone" if num_jobs == 1 else "together"].setdefault(
            num_tokens.bit_length(), SizeAverage()
        )
        is_cold = of_size.num_ticks < COLD_TICKS
        of_size.add(num_tokens, num_tokens / seconds)
        if is_cold and self._num_warm:
            return
        share = NEWEST_SHARE if self._num_warm else 1.0
        self._num_warm += not is_cold
        self.tokens_per_second += share * (num_tokens / seconds - self.tokens_per_second)
        self.lane_tokens_per_second += share * (fullest_lane / seconds - self.lane_tokens_per_second)

    def num_alone(self, num_tokens: int) -> int:
        """Return the number of ticks of about this size that one job had alone."""
        return self._by_size["alone"].get(num_tokens.bit_length(), SizeAverage()).num_ticks

    def table(self) -> dict[PackSize, list[tuple[int, float]]]:
        """Return (tokens, tokens per second) by size. Sizes with only cold ticks are omitted."""
        return {
            pack_size: [
                (round(average.num_tokens), round(average.tokens_per_second, 1))
                for _, average in sorted(by_size.items())
                if average.num_ticks > COLD_TICKS
            ]
            for pack_size, by_size in self._by_size.items()
        }
