"""Uploads a folder to the Hugging Face Hub: a child process with the hub's token, which reads no model.

`python -m worker.children.hub_uploader ARGS.json`. It may access no database and no store.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from catalog.error_texts import ErrorText
from catalog.processes import deny_inspection
from worker.protocol.errors import disk_error
from worker.protocol.mailbox import Json, read_json, write_json

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})


def upload(arguments_path: Path) -> None:
    """Upload as specified by the file with `{folder, repository, message, result}`. Writes `{url}` or an error to the
    result file. A repository that does not exist is created as a private one.

    folder: None: only check that the token may write to the repository. `url` is then None.
    """
    arguments = read_json(arguments_path)
    folder = None if arguments["folder"] is None else Path(arguments["folder"])
    answer = _uploaded(folder, arguments["repository"], arguments["message"])
    write_json(Path(arguments["result"]), answer)


def _uploaded(folder: Path | None, repository: str, message: str) -> Json:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode() or get_token() is None:
        return _unable(is_offline=constants.is_offline_mode())
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if folder is None:
            api.auth_check(repository, write=True)
            return {"url": None}
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        return _refused(repository, error.response.status_code)
    except ValueError as error:  # an invalid name, or a file that the hub rejects
        return _error("hub_rejected_files", reason=str(error)[:300])
    except Exception as error:  # noqa: BLE001 - `_failure` raises what it does not know
        return _failure(repository, error)
    return {"url": str(commit.commit_url)}


def _failure(repository: str, error: Exception) -> Json:
    """Return the error for an interrupted upload. Raises other errors again."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return {"error": disk_error(error)}
    if isinstance(error, RuntimeError):  # the hub's client raises it for a part that was not stored
        return _unreachable(repository, "a part of a file was not stored")
    if not _is_of_connection(error):
        raise error
    return _unreachable(repository, str(error)[:200] or type(error).__name__)


def _unable(*, is_offline: bool) -> Json:
    """Return the error of a worker that is offline by its settings, or has no token."""
    if is_offline:
        return _error("hub_offline")
    return _error("hub_no_token")


def _is_of_connection(error: Exception) -> bool:
    """Return whether the hub's client can't reach the hub. Its HTTP library has error classes of its own."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return isinstance(error, HTTPError | OSError)


def _refused(repository: str, status: int) -> Json:
    """Return the error for a response of the hub."""
    if status == 401:
        return _error("hub_token_invalid")
    if status in (403, 404):
        return _error("hub_forbidden", repository=repository)
    if status in (408, 409, 412, 423, 429) or status >= 500:
        return _unreachable(repository, f"it answers with the status {status}")
    return _error("hub_rejected", repository=repository, status=status)


def _unreachable(repository: str, reason: str) -> Json:
    return _error("hub_interrupted", repository=repository, reason=reason)


def _error(name: str, /, **values: str | int) -> Json:
    return {"error": ErrorText.of(name, param=None, **values).report()}


if __name__ == "__main__":
    deny_inspection()  # its environment holds the hub's token
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    upload(Path(sys.argv[1]))
