# pyright: basic
"""Reads the license that a base model's source states. It becomes part of every adapter's lineage record."""

import re
from pathlib import Path

CARD = "README.md"
MAX_CARD_CHARS = 2**16
"""Maximum characters of a model card that are read. The front matter is at the start."""
FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
MAX_LICENSE_CHARS = 100
NAME = r"[\"']?([\w.+][\w .+-]{0,99}?)[\"']?"
COMMENT = r"[ \t]*(?:#.*)?$"
ITEM = re.compile(rf"^[ \t]*-[ \t]+{NAME}{COMMENT}", re.MULTILINE)


def license_of_folder(folder: Path) -> str | None:
    """Return the license in the model card's front matter: an SPDX-like id, or license_name if it is "other"."""
    try:
        with (folder / CARD).open(encoding="utf-8", errors="replace") as card:
            found = FRONT_MATTER.match(card.read(MAX_CARD_CHARS))
    except OSError:
        return None
    if found is None:
        return None
    found_license = _value(found[1], "license")
    if found_license in (None, "other"):
        return _value(found[1], "license_name") or found_license
    return found_license


def license_of_gguf(path: Path) -> str | None:
    """Return the license in the metadata field general.license."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    found_license = field.contents() if field is not None else None
    return found_license[:MAX_LICENSE_CHARS] if isinstance(found_license, str) and found_license else None


def _value(front_matter: str, key: str) -> str | None:
    """Return a scalar, or the comma-separated items of a list (`[a, b]`, or one item per line)."""
    found = re.search(rf"^{key}:[ \t]*{NAME}{COMMENT}", front_matter, re.MULTILINE)
    if found:
        return found[1]
    lines = re.search(rf"^{key}:{COMMENT}\n((?:[ \t]*-[ \t].*(?:\n|\Z))+)", front_matter, re.MULTILINE)
    inline = re.search(rf"^{key}:[ \t]*\[([^\]\n]*)\]{COMMENT}", front_matter, re.MULTILINE)
    if lines:
        names = ITEM.findall(lines[1])
    elif inline:
        names = re.findall(rf"(?:^|,)[ \t]*{NAME}[ \t]*(?=,|$)", inline[1])
    else:
        return None
    return ", ".join(names)[:MAX_LICENSE_CHARS] or None
