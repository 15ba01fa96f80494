"""A small S3 server with the arguments, the port and the folder layout of versitygw, for the stand-in of its image.

`s3_server.py --port :7070 --health /health posix /data`

An object is the file /data/BUCKET/KEY. Finished files are renamed into place, so objects survive a restart. Requests
must carry the access key of ROOT_ACCESS_KEY_ID, but signatures are not checked. Runs without Lorry's packages.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

PORT = int(sys.argv[sys.argv.index("--port") + 1].rpartition(":")[2])
HEALTH = sys.argv[sys.argv.index("--health") + 1]
ROOT = Path(sys.argv[-1])
CREDENTIAL = f"Credential={os.environ['ROOT_ACCESS_KEY_ID']}/"
STAGED = ROOT / ".sgwtmp"
PLACING = threading.Lock()
BINARY = "application/octet-stream"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log no requests."""

    def respond(
        self,
        status: int,
        body: bytes | str = b"",
        headers: Mapping[str, str] | None = None,
        kind: str = "application/xml",
    ) -> None:
        content = body if isinstance(body, bytes) else f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'.encode()
        self.send_response(status)
        if status != 204:
            all_headers = {"Content-Length": str(len(content)), "Content-Type": kind, **(headers or {})}
            for name, value in all_headers.items():
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.respond(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def store_body(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        left = int(self.headers.get("Content-Length") or 0)
        with path.open("wb") as out:
            while left and (chunk := self.rfile.read(min(left, 2**20))):
                left -= len(chunk)
                out.write(chunk)

    def place(self, staged: Path, target: Path) -> bool:
        with PLACING:
            if self.headers.get("If-None-Match") == "*" and target.exists():
                staged.unlink()
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)
        return True

    def route(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == HEALTH:
            self.respond(200)
            return
        if CREDENTIAL not in self.headers.get("Authorization", "") + f"Credential={unquote(_credential(parts.query))}":
            self.body()
            self.fail(403, "InvalidAccessKeyId")
            return
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if not bucket or ".." in key.split("/"):
            self.fail(400, "InvalidRequest")
        elif not key:
            self.on_bucket(ROOT / bucket, query)
        elif not (ROOT / bucket).is_dir():
            self.body()
            self.fail(404, "NoSuchBucket")
        elif "uploads" in query or "uploadId" in query:
            self.on_upload(ROOT / bucket / key, query)
        elif self.command in ("PUT", "DELETE"):
            self.on_change(ROOT / bucket / key)
        else:
            self.on_read(ROOT / bucket / key)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = route

    def on_bucket(self, folder: Path, query: Mapping[str, str]) -> None:
        if self.command == "PUT":
            self.body()
            if folder.exists():
                self.fail(409, "BucketAlreadyOwnedByYou")
            else:
                folder.mkdir()
                self.respond(200)
        elif not folder.is_dir():
            self.body()
            self.fail(404, "NoSuchBucket")
        elif self.command == "POST" and "delete" in query:
            names = [
                found.text or "" for found in ElementTree.fromstring(self.body()).iter() if found.tag.endswith("Key")
            ]
            for name in names:
                (folder / name).unlink(missing_ok=True)
            deleted = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            self.respond(200, f"<DeleteResult>{deleted}</DeleteResult>")
        else:
            self.list(folder, query)

    def list(self, folder: Path, query: Mapping[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token") or query.get("start-after", "")
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        keys = [key for key in found if key.startswith(prefix) and key > after]
        page = keys[: int(query.get("max-keys", 1000))]
        rows = "".join(map(_row, (folder / key for key in page), page))
        is_truncated = len(keys) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_truncated else ""
        self.respond(
            200,
            f"<ListBucketResult><IsTruncated>{str(is_truncated).lower()}</IsTruncated>{token}{rows}</ListBucketResult>",
        )

    def on_upload(self, target: Path, query: Mapping[str, str]) -> None:
        parts = STAGED / query.get("uploadId", "none")
        if self.command == "PUT":
            part = parts / query["partNumber"].zfill(6)
            self.store_body(part)
            self.respond(200, headers={"ETag": _etag(part)})
        elif self.command == "DELETE":
            shutil.rmtree(parts, ignore_errors=True)
            self.respond(204)
        elif "uploads" in query:
            self.body()
            name = uuid.uuid4().hex
            (STAGED / name).mkdir(parents=True)
            self.respond(
                200, f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            )
        else:
            self.body()
            staged = STAGED / uuid.uuid4().hex
            with staged.open("wb") as out:
                for part in sorted(parts.iterdir()):
                    out.write(part.read_bytes())
            shutil.rmtree(parts)
            tag = escape(_etag(staged))
            if self.place(staged, target):
                self.respond(200, f"<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>")
            else:
                self.fail(412, "PreconditionFailed")

    def on_change(self, target: Path) -> None:
        if self.command == "DELETE":
            target.unlink(missing_ok=True)
            self.respond(204)
            return
        staged, source = STAGED / uuid.uuid4().hex, self.headers.get("x-amz-copy-source")
        if source is None:
            self.store_body(staged)
        else:
            self.body()
            original = ROOT / unquote(source).lstrip("/")
            if not original.is_file():
                self.fail(404, "NoSuchKey")
                return
            STAGED.mkdir(exist_ok=True)
            shutil.copyfile(original, staged)
        tag = _etag(staged)
        if not self.place(staged, target):
            self.fail(412, "PreconditionFailed")
        elif source is None:
            self.respond(200, headers={"ETag": tag})
        else:
            self.respond(200, f"<CopyObjectResult><ETag>{escape(tag)}</ETag></CopyObjectResult>")

    def on_read(self, path: Path) -> None:
        if not path.is_file():
            self.fail(404, "NoSuchKey")
            return
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            modified = formatdate(state.st_mtime, usegmt=True)
            headers = {"ETag": _etag(path), "Last-Modified": modified, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if self.command == "HEAD":
                self.respond(200, headers={**headers, "Content-Length": str(state.st_size)}, kind=BINARY)
            elif wanted is None:
                self.respond(200, file.read(), headers, BINARY)
            elif int(wanted[1]) >= state.st_size:
                self.fail(416, "InvalidRange")
            else:
                start, end = int(wanted[1]), min(int(wanted[2] or state.st_size - 1), state.st_size - 1)
                file.seek(start)
                headers["Content-Range"] = f"bytes {start}-{end}/{state.st_size}"
                self.respond(206, file.read(end - start + 1), headers, BINARY)


def _credential(query: str) -> str:
    """Return the credential of a signed URL."""
    return parse_qs(query).get("X-Amz-Credential", [""])[0]


def _etag(path: Path) -> str:
    return f'"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}"'


def _row(path: Path, key: str) -> str:
    try:
        state, tag = path.stat(), escape(_etag(path))
    except FileNotFoundError:  # deleted since it was listed
        return ""
    modified = datetime.fromtimestamp(state.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    name, size = f"<Key>{escape(key)}</Key>", f"<Size>{state.st_size}</Size>"
    return f"<Contents>{name}<LastModified>{modified}</LastModified><ETag>{tag}</ETag>{size}</Contents>"


if __name__ == "__main__":
    ThreadingHTTPServer.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()
