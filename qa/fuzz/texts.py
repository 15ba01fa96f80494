"""Query parameters are text once they are sent, whatever their type was in the generated case."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

TEXTS = {"tag"}
"""Query parameters that accept any text. An unknown tag matches no job."""


def is_any_text(message: str, url: str) -> bool:
    """Return whether a case that is reported as invalid only because of its query parameters is valid as it was sent:
    all reported parameters in the URL accept any text."""
    blamed = re.search(r"Invalid component: parameters? (.+?) in query", message)
    if blamed is None:
        return False
    sent = parse_qs(urlsplit(url).query, keep_blank_values=True)
    return TEXTS.issuperset(name for name in re.findall(r"`(\w+)`", blamed[1]) if name in sent)
