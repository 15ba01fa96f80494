"""Base models, adapters and checkpoints by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from lorry.errors import LorryError, WaitTimeout, text_of
from lorry.models import Model
from lorry.resources.resource import Resource

Kind = Literal["hub", "folder", "gguf"]


class Models(Resource):
    def add(
        self,
        name: str,
        source: str,
        *,
        kind: Kind | None = None,
        revision: str | None = None,
        chat_template: str | None = None,
    ) -> Model:
        """Make the service import a base model: a Hub id, or a safetensors folder or GGUF file on the service's disk.

        chat_template: chatml, gemma, llama3, zephyr, or the text of a Jinja template. Replaces the source's own.

        Returns immediately, in state `importing`. Adding the same source under the same name again is no error.
        """
        kind = kind or guess_kind(source)
        if kind != "hub":
            source = str(Path(source).expanduser().resolve())
        body = {"name": name, "kind": kind, "source": source, "revision": revision, "chat_template": chat_template}
        return self._post(Model, "models", body=body)

    def wait(
        self,
        name: str,
        *,
        on_progress: Callable[[Model], None] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = 0.5,
    ) -> Model:
        """Wait until the base model is `ready`. Raises LorryError with the import's error if it failed."""
        model = self._poll(
            lambda: self.get(name),
            lambda model: model.state in {"ready", "failed"},
            on_progress=on_progress,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            timeout=lambda model: WaitTimeout(
                "import_timeout", name=name, timeout_seconds=timeout_seconds or 0, state=model.state
            ),
        )
        if model.state == "failed":
            fallback = text_of("import_failed", name=name)
            error = model.error
            if error is None:
                raise LorryError.from_report(**fallback)
            remedy = error.remedy or fallback["remedy"]
            raise LorryError.from_report(code=error.code, message=error.message, remedy=remedy)
        return model

    def list(self) -> Iterator[Model]:
        return self._items(Model, "models")

    def get(self, name: str) -> Model:
        return self._get(Model, "models", name)

    def delete(self, name: str) -> None:
        self._delete("models", name)


def guess_kind(source: str) -> Kind:
    """Return the kind of a source. An existing path, or a text written as a path, is a folder or a GGUF file; any other
    text is a Hub id."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" or path.is_file():
        return "gguf"
    return "folder" if path.is_dir() or source.startswith(("/", "./", "../", "~")) else "hub"
