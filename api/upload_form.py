"""The fields of an upload's form, from the callbacks of a streaming parser."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING

from python_multipart.multipart import parse_options_header

from catalog.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 4096
MAX_FILENAME_LENGTH = 1024
KNOWN_FIELDS = ("purpose", "file")
LATER_FIELDS = ("expires_after", "expires_after[anchor]", "expires_after[seconds]")
"""Fields of OpenAI's that Lorry does not obey yet: refused by name, never ignored."""


class UploadForm:
    """Collects small fields; hands the file's bytes on through `pending` and `take`."""

    def __init__(self) -> None:
        self.pending = bytearray()
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._name = ""
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._ended = False

    def take(self) -> bytes:
        """The file's bytes that came since the last call."""
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    def purpose(self) -> str:
        return self._fields["purpose"].decode("utf-8", "replace")

    def filename(self) -> str:
        """As it was sent: the catalog makes a label of it."""
        return (self._filename or "")[:MAX_FILENAME_LENGTH]

    def check_complete(self) -> None:
        if not self._ended:
            raise _refused("The form ends before its last boundary.", code="invalid_multipart", param="file")
        if self._filename is None:
            raise _refused("'file' is missing.", code="missing_required_parameter", param="file")
        if "purpose" not in self._fields:
            raise _refused("'purpose' is missing.", code="missing_required_parameter", param="purpose")

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
        if self._name == "file":
            if b"filename" not in options:
                raise _refused("The part 'file' has no filename.", code="invalid_multipart", param="file")
            self._filename = options[b"filename"].decode("utf-8", "replace")
        else:
            self._fields[self._name] = bytearray()

    def _check_name(self) -> None:
        name = self._name
        shown = json.dumps(name[:100])[1:-1]
        if name in LATER_FIELDS:
            raise InvalidRequest(
                "Files don't expire by themselves yet, so 'expires_after' can't be obeyed.",
                code="unsupported_parameter",
                remedy="Leave it out, and delete the file when you no longer need it.",
                param="expires_after",
            )
        if name not in KNOWN_FIELDS:
            near = difflib.get_close_matches(name, KNOWN_FIELDS, n=1)
            raise InvalidRequest(
                f"There is no field '{shown}'.",
                code="unknown_parameter",
                remedy=f"Did you mean '{near[0]}'?" if near else "Send only 'purpose' and 'file'.",
                param=shown,
            )
        if name in self._fields or (name == "file" and self._filename is not None):
            raise _refused(f"'{name}' is there twice.", code="repeated_parameter", param=name)

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.pending += memoryview(data)[start:end]
            return
        field = self._fields[self._name]
        if len(field) + end - start > MAX_FIELD_BYTES:
            raise _refused(f"'{self._name}' is too long.", code="invalid_value", param=self._name)
        field += data[start:end]

    def _end(self) -> None:
        self._ended = True


def _refused(message: str, *, code: str, param: str) -> InvalidRequest:
    remedy = "Send a form with one 'purpose' and one 'file', as the openai client's files.create does."
    return InvalidRequest(message, code=code, remedy=remedy, param=param)
