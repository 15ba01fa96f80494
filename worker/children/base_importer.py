"""Imports a base model: a child process that creates the folder of a base model from its source, and exits.

`python -m worker.children.base_importer ARGS.json`. It may access the model hub, but no database and no store.
"""

from __future__ import annotations

import errno
import gc
import sys

if __name__ == "__main__":
    gc.disable()  # the imports free nothing, so collections would waste a quarter of their time

from pathlib import Path

from catalog.process_inspection import deny_inspection
from lora_core.base_model.model import describe_base
from lora_core.errors import LoraCoreError
from lora_core.model_files.import_base import import_base
from worker.children.tokenizer.chat_template import may_render_tools
from worker.protocol.errors import described, disk_error
from worker.protocol.mailbox import Json, read_json, write_json


def import_base_model(arguments_path: Path) -> None:
    """Import as specified by the file with `{source, kind, revision, target_dir, result}`. Writes a description or an
    error to the result file."""
    arguments = read_json(arguments_path)
    target_dir = Path(arguments["target_dir"])
    try:
        imported = import_base(
            source=arguments["source"],
            kind=arguments["kind"],
            revision=arguments["revision"],
            target_dir=target_dir,
        )
        facts = {"license": imported.license, "renders_tools": may_render_tools(target_dir)}
        description = describe_base(target_dir) | facts
        result: Json = {"description": description, "commit": imported.commit}
    except LoraCoreError as error:
        result = {"error": described(error)}
    except MemoryError:
        result = {"error": _limit_error("needs more memory than the limit for its size, or than this machine has.")}
    except OSError as error:
        if error.errno == errno.EFBIG:
            result = {"error": _limit_error("writes a file that is larger than the limit for its size.")}
        else:
            result = {"error": disk_error(error) if error.errno else _source_error(error)}
    write_json(Path(arguments["result"]), result)


def _limit_error(what: str) -> dict[str, str]:
    """Return the error for an exceeded resource limit of this process; see worker.process.sandbox."""
    remedy = "Check the source's config.json and tokenizer, and the worker's memory and disk."
    return {"code": "import_limit", "message": f"The import of the base model {what}", "remedy": remedy}


def _source_error(error: OSError) -> dict[str, str]:
    """Return the error for a source that the hub's client or transformers could not read."""
    remedy = "Check the source's name, and that this machine can reach it."
    return {"code": "source_unreachable", "message": str(error)[:1000], "remedy": remedy}


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    deny_inspection()  # its environment may hold the hub's token
    import_base_model(Path(sys.argv[1]))
