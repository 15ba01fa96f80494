"""Word overlap of an answer with a reference: F1 over words, as in SQuAD (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words with multiplicity, ignoring case and punctuation.

    0 means no common word; 1 means the same words in any order.
    """
    said, wanted = _words(answer), _words(reference)
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def mean_f1(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the mean over (answer, reference) pairs, of which there is at least one."""
    scores = [f1(answer, reference) for answer, reference in pairs]
    return sum(scores) / len(scores)


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
