"""Texts of errors and warnings: a code for programs, a message and a remedy.

The TOML tables of this folder contain them by subject. An entry's name is its code unless it has a `code`. `{name}`
stands for a value. Names are unique across all tables.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorText:
    """The text of an error or a warning. `param` names the invalid field or parameter."""

    code: str
    message: str
    remedy: str
    param: str | None = None

    @classmethod
    def of(cls, name: str, /, *, param: str | None = None, **values: str | float) -> ErrorText:
        """Return the text with this name in the tables, with `values` for its placeholders."""
        text = templates()[name]
        return cls(
            code=text.code, message=text.message.format(**values), remedy=text.remedy.format(**values), param=param
        )

    def sentence(self) -> str:
        """Return the message and the remedy as one text."""
        return f"{self.message} {self.remedy}".strip()

    def report(self) -> dict[str, str]:
        """Return code, message and remedy, as processes send them and as resources store them."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy}

    def as_job_error(self) -> dict[str, str | None]:
        """Return the text in the format of the `error` field of jobs, plans and sweeps."""
        return {"code": self.code, "message": self.sentence(), "param": self.param}


@cache
def templates() -> dict[str, ErrorText]:
    """Return all texts by name, with their placeholders."""
    found: dict[str, ErrorText] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
            found[name] = ErrorText(code=entry.get("code", name), message=entry["message"], remedy=entry["remedy"])
    return found
