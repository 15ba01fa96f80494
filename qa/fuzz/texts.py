"""What a query's parameters are once they are sent: text, whatever they were in the case that made them."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

TEXTS = {"tag"}
"""Parameters of queries that take any text: what no job is tagged with finds none."""


def is_any_text(message: str, url: str) -> bool:
    """Whether a case that is said to be wrong in parameters of its query, which no others were, is right as it was
    sent: those of them that are in the URL take any text."""
    blamed = re.search(r"Invalid component: parameters? (.+?) in query", message)
    if blamed is None:
        return False
    sent = parse_qs(urlsplit(url).query, keep_blank_values=True)
    return TEXTS.issuperset(name for name in re.findall(r"`(\w+)`", blamed[1]) if name in sent)
