# pyright: basic
"""The licence that a base model's source names of itself: it goes into the lineage of every adapter trained on it."""

import re
from pathlib import Path

CARD = "README.md"
MAX_CARD_CHARS = 2**16
"""A card's front matter is on its first lines; the rest isn't read."""
FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
KEY = r"^{}:[ \t]*[\"']?([\w.+-][\w .+-]{{0,99}}?)[\"']?[ \t]*(?:#.*)?$"


def licence_of_folder(folder: Path) -> str | None:
    """By the front matter of its model card: an SPDX-like id, or the own name of one that the hub calls "other"."""
    try:
        with (folder / CARD).open(encoding="utf-8", errors="replace") as card:
            found = FRONT_MATTER.match(card.read(MAX_CARD_CHARS))
    except OSError:
        return None
    if found is None:
        return None
    licence = _value(found[1], "license")
    return _value(found[1], "license_name") or licence if licence in (None, "other") else licence


def licence_of_gguf(path: Path) -> str | None:
    """By its metadata, general.license."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    licence = field.contents() if field is not None else None
    return licence[:100] if isinstance(licence, str) and licence else None


def _value(front_matter: str, key: str) -> str | None:
    found = re.search(KEY.format(key), front_matter, re.MULTILINE)
    return found[1] if found else None
