"""A client that sends files in parts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from catalog.settings import Settings
from catalog.storage import files, multipart_uploads
from catalog.storage.multipart_uploads import UploadView
from catalog.storage.store import ArtifactStore, Blob, open_store
from catalog.tables.storage import File
from tests.catalog.world import World


def row(word: str) -> bytes:
    turns = [{"role": "user", "content": word}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"messages": turns}).encode() + b"\n"


ONE, TWO, THREE = (row(word) for word in ("one", "two", "three"))
WHOLE = ONE + TWO + THREE


class Sender:
    """An upload client with the key of the project or of another project."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.settings = Settings(data_dir=folder, max_file_bytes=1_000)
        self.store: ArtifactStore = open_store(self.settings)
        self.project_id = world.caller.project_id
        self.spool = folder / "spool"

    def begin(self, num_bytes: int = len(WHOLE), **given: Any) -> str:
        fields: dict[str, Any] = {"purpose": "fine-tune", "filename": "a.jsonl", "lifetime_seconds": None, **given}
        settings = self.settings
        view = multipart_uploads.create(
            self.world.db, project_id=self.project_id, num_bytes=num_bytes, settings=settings, **fields
        )
        assert view.status == "pending"
        return view.upload.id

    def part(self, upload_id: str, content: bytes) -> str:
        spooled = self.folder / "part"
        spooled.write_bytes(content)
        sent = Blob(digest=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
        part = multipart_uploads.add_part(
            self.world.db,
            self.store,
            project_id=self.project_id,
            upload_id=upload_id,
            spooled=spooled,
            content=sent,
            settings=self.settings,
        )
        return part.id

    def complete(self, upload_id: str, *part_ids: str, md5: str | None = None, again: bool = False) -> UploadView:
        return multipart_uploads.complete(
            self.world.db,
            self.store,
            project_id=self.project_id,
            upload_id=upload_id,
            part_ids=part_ids,
            md5=md5,
            folder=self.spool,
            settings=self.settings,
            is_client_retry=again,
        )

    def cancel(self, upload_id: str, *, again: bool = False) -> UploadView:
        return multipart_uploads.cancel(
            self.world.db, project_id=self.project_id, upload_id=upload_id, is_client_retry=again
        )

    def content(self, file: File | None) -> bytes:
        assert file is not None
        return b"".join(self.store.open_blob(file.digest))

    def made(self) -> list[File]:
        """Return the created files, without the file of the world."""
        listed = files.list_page(self.world.db, project_id=self.world.caller.project_id).items
        return [file for file in listed if file.id != self.world.file_id]
