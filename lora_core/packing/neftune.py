# pyright: basic
"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings while a job trains, ±alpha / √(L · D).

Letters: T tokens of the tick, t of a slice, L of one sequence, D features. L is the sequence's own length, for
there is no padding here; an implementation with padded batches takes the padded length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_core.runtime.counter_rng import uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseKey:
    """Names the noise of one slice, whose sequences have these lengths."""

    alpha: float
    seed: int
    step: int
    slice_index: int
    lengths: tuple[int, ...]

    def noise_tD(self, num_features: int) -> Tensor:
        """fp32, on the host."""
        count = sum(self.lengths) * num_features
        numbers = 2 * uniform("neftune", self.seed, self.step, self.slice_index, count=count) - 1
        bounds_t = np.repeat(self.alpha / np.sqrt(np.array(self.lengths) * num_features), self.lengths)
        return torch.from_numpy((numbers.reshape(-1, num_features) * bounds_t[:, None]).astype(np.float32))


def with_noise(y_1TD: Tensor, places: list[tuple[slice, NoiseKey]]) -> Tensor:
    """The embeddings with the noise of each slice at its place; others keep their bits."""
    if not places:
        return y_1TD
    noisy_1TD = y_1TD.clone()
    for place, key in places:
        noisy_1TD[0, place] += key.noise_tD(y_1TD.shape[-1]).to(y_1TD.device)
    return noisy_1TD
