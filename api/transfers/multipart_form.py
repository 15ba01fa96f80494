"""Parses the fields of an upload form from the callbacks of a streaming parser."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.multipart import parse_options_header

from catalog.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 4096
MAX_FILENAME_LENGTH = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class FormShape:
    """The allowed fields of a form. The bytes of `content` are the upload, called `noun` in messages; other fields are
    short texts."""

    noun: str
    content: str
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def fields(self) -> tuple[str, ...]:
        return (*self.needed, self.content, *self.optional)


FILE = FormShape(
    noun="file",
    content="file",
    needed=("purpose",),
    optional=("expires_after[anchor]", "expires_after[seconds]"),
)
PART = FormShape(
    noun="part",
    content="data",
)


class UploadForm:
    """Collects the small fields. The file's bytes are passed on through `pending` and `take`."""

    def __init__(self, shape: FormShape) -> None:
        self.shape = shape
        self.pending = bytearray()
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._name = ""
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._ended = False

    def take(self) -> bytes:
        """Return the file's bytes that arrived since the last call."""
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    def fields(self) -> dict[str, str]:
        """Return the fields that were sent, except the file."""
        return {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}

    def filename(self) -> str:
        """Return the file name as it was sent. The catalog sanitizes it."""
        return (self._filename or "")[:MAX_FILENAME_LENGTH]

    def check_complete(self) -> None:
        if not self._ended:
            raise InvalidRequest("form_not_closed", content=self.shape.noun, param=self.shape.content)
        sent = self._fields if self._filename is None else {*self._fields, self.shape.content}
        for name in (self.shape.content, *self.shape.needed):
            if name not in sent:
                raise InvalidRequest(f"field_of_{self.shape.noun}_missing", name=name, param=name)

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._name_part,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._disposition = b""
        self._header_name.clear()
        self._header_value.clear()

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if bytes(self._header_name).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _name_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._check_name()
        if self._name == self.shape.content:
            if b"filename" not in options:
                raise InvalidRequest("form_field_without_filename", name=self._name, param=self._name)
            self._filename = options[b"filename"].decode("utf-8", "replace")
        else:
            self._fields[self._name] = bytearray()

    def _check_name(self) -> None:
        name = self._name
        shown = json.dumps(name[:100])[1:-1]
        known = self.shape.fields()
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            if similar:
                raise InvalidRequest("unknown_form_field_like", shown=shown, similar=similar[0], param=shown)
            raise InvalidRequest("unknown_form_field", shown=shown, known=", ".join(map(repr, known)), param=shown)
        if name in self._fields or (name == self.shape.content and self._filename is not None):
            raise InvalidRequest("repeated_parameter", name=name, param=name)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self.shape.content:
            self.pending += memoryview(data)[start:end]
            return
        field = self._fields[self._name]
        if len(field) + end - start > MAX_FIELD_BYTES:
            raise InvalidRequest(
                "form_field_too_long", name=self._name, max_field_bytes=MAX_FIELD_BYTES, param=self._name
            )
        field += data[start:end]

    def _end(self) -> None:
        self._ended = True
