"""The import of a base model: a child process that makes the folder of one from its source, and ends.

`python -m worker.children.base_importer ARGS.json`. It may reach the model hub, and knows no database and no store.
"""

from __future__ import annotations

import errno
import gc
import sys

if __name__ == "__main__":
    gc.disable()  # a quarter of the time that the imports take is a search among things that stay

from pathlib import Path

from catalog.process_inspection import deny_inspection
from lora_core.base_model.model import describe_base
from lora_core.errors import LoraCoreError
from lora_core.model_files.import_base import import_base
from worker.protocol.errors import described, disk_error
from worker.protocol.mailbox import Json, read_json, write_json


def import_base_model(arguments_path: Path) -> None:
    """Obey `{source, kind, revision, target_dir, result}`; the result file holds a description or an error. Of the kind
    `here` the folder is there already, and is only described."""
    arguments = read_json(arguments_path)
    target_dir = Path(arguments["target_dir"])
    try:
        if arguments["kind"] == "here":
            result: Json = {"description": describe_base(target_dir), "commit": None}
        else:
            imported = import_base(
                source=arguments["source"],
                kind=arguments["kind"],
                revision=arguments["revision"],
                target_dir=target_dir,
            )
            description = describe_base(target_dir) | {"license": imported.license}
            result = {"description": description, "commit": imported.commit}
    except LoraCoreError as error:
        result = {"error": described(error)}
    except MemoryError:
        result = {"error": _limit_error("takes more memory than its size allows for, or than this machine has.")}
    except OSError as error:
        if error.errno == errno.EFBIG:
            result = {"error": _limit_error("writes a larger file than its size allows for.")}
        else:
            result = {"error": disk_error(error) if error.errno else _source_error(error)}
    write_json(Path(arguments["result"]), result)


def _limit_error(what: str) -> dict[str, str]:
    """Of the resource limits of this process; see worker.process.sandbox."""
    remedy = "Look at the source's config.json and tokenizer, and at the worker's memory and disk."
    return {"code": "import_limit", "message": f"The import of the base model {what}", "remedy": remedy}


def _source_error(error: OSError) -> dict[str, str]:
    """What the hub's client or transformers could not read."""
    remedy = "Check the source's name, and that this machine reaches it."
    return {"code": "source_unreachable", "message": str(error)[:1000], "remedy": remedy}


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    deny_inspection()  # its environment may hold the hub's token
    import_base_model(Path(sys.argv[1]))
