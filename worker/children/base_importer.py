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

from catalog.error_texts import ErrorText
from catalog.processes import deny_inspection
from lora_core.base_model.model import describe_base
from lora_core.errors import LoraCoreError
from lora_core.model_files.import_base import import_base
from worker.children.tokenizer.chat_template import Refused, describe_templates
from worker.children.tokenizer.text_encoder import BaseText
from worker.protocol.errors import described, disk_error
from worker.protocol.mailbox import Json, read_json, write_json


def import_base_model(arguments_path: Path) -> None:
    """Import as specified by the file with `{source, kind, revision, chat_template, target_dir, result}`. Writes a
    description or an error to the result file."""
    arguments = read_json(arguments_path)
    target_dir = Path(arguments["target_dir"])
    try:
        imported = import_base(
            source=arguments["source"],
            kind=arguments["kind"],
            revision=arguments["revision"],
            chat_template=arguments["chat_template"],
            target_dir=target_dir,
        )
        if arguments["chat_template"] is not None:
            _refuse_unusable_template(target_dir)
        facts = {"license": imported.license, **describe_templates(target_dir)}
        description = describe_base(target_dir) | facts
        result: Json = {"description": description, "commit": imported.commit}
    except (LoraCoreError, Refused) as error:
        result = {"error": described(error)}
    except MemoryError:
        result = {"error": ErrorText.of("import_memory_limit").report()}
    except OSError as error:
        if error.errno == errno.EFBIG:
            result = {"error": ErrorText.of("import_file_limit").report()}
        else:
            result = {"error": disk_error(error) if error.errno else _source_error(error)}
    write_json(Path(arguments["result"]), result)


def _refuse_unusable_template(base_dir: Path) -> None:
    """Raise Refused for a template that does not end answers with a special token: no answer would ever end."""
    if not BaseText(base_dir).turn_ends():
        raise Refused("given_chat_template_unusable")


def _source_error(error: OSError) -> dict[str, str]:
    """Return the error for a source that the hub's client or transformers could not read."""
    return ErrorText.of("source_unreachable", reason=str(error)[:1000]).report()


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    deny_inspection()  # its environment may hold the hub's token
    import_base_model(Path(sys.argv[1]))
