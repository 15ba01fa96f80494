"""How much of a reference an answer says: F1 over words, as SQuAD measures answers (Rajpurkar et al., 2016)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs; case and punctuation aside.

    0 where they share no word, 1 where they have the same ones, in any order.
    """
    said, wanted = _words(answer), _words(reference)
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def mean_f1(pairs: Iterable[tuple[str, str]]) -> float:
    """Over (answer, reference) pairs; there is at least one."""
    scores = [f1(answer, reference) for answer, reference in pairs]
    return sum(scores) / len(scores)


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
