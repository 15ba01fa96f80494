"""The word overlap of an answer and a reference: F1 as in SQuAD (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words with their counts, without case and punctuation.

    0: no common word. 1: the same words in any order.
    """
    answered, expected = _words(answer), _words(reference)
    shared = (answered & expected).total()
    return 2 * shared / (answered.total() + expected.total()) if shared else 0.0


def mean_f1(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the mean over (answer, reference) pairs, at least one."""
    scores = [f1(answer, reference) for answer, reference in pairs]
    return sum(scores) / len(scores)


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
