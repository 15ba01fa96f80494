"""Exports an adapter: a child process that writes and verifies the files of an export, and exits.

`python -m worker.children.exporter ARGS.json`. It may access no database, no store and no network.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

if __name__ == "__main__":
    gc.disable()  # the imports free nothing, so collections would waste a quarter of their time

from functools import partial
from pathlib import Path

from catalog import failpoints
from catalog.disk import tells_of_full
from catalog.error_texts import ErrorText
from lora_core.errors import LoraCoreError, UnsupportedModel
from lora_core.model_files.export import export_model
from worker.children.tokenizer.chat_template import Refused
from worker.children.tokenizer.text_encoder import BaseText
from worker.process import gguf_converter
from worker.protocol.errors import described, disk_error
from worker.protocol.mailbox import Json, read_json, write_json


def export(arguments_path: Path) -> None:
    """Export as specified by the file with `{adapter_dir, base_dir, out_dir, format, quantization, name, file_stem,
    converter, result}`. Writes `{verification, cost}` or an error to the result file.

    converter: the path of llama.cpp's convert_hf_to_gguf.py, or None.
    """
    arguments = read_json(arguments_path)
    failpoints.pass_by("exporting")
    base_dir = Path(arguments["base_dir"])
    try:
        result: Json = export_model(
            Path(arguments["adapter_dir"]),
            base_dir,
            Path(arguments["out_dir"]),
            format=arguments["format"],
            quantization=arguments["quantization"],
            name=arguments["name"],
            file_stem=arguments["file_stem"],
            end_ids=() if arguments["format"] == "gguf-lora" else _end_ids(base_dir),
            convert=None if arguments["converter"] is None else partial(_convert, arguments),
        )
    except LoraCoreError as error:
        result = {"error": described(error)}
    except MemoryError:
        result = {"error": ErrorText.of("export_memory_limit").report()}
    except OSError as error:
        is_limit = error.errno == errno.EFBIG
        result = {"error": ErrorText.of("export_file_limit").report() if is_limit else disk_error(error)}
    write_json(Path(arguments["result"]), result)


def _convert(arguments: Json, model_dir: Path, path: Path) -> None:
    """Write a model folder as a GGUF file with llama.cpp's converter. Raises UnsupportedModel, MemoryError, OSError."""
    options = ("--outfile", str(path), "--outtype", arguments["quantization"], "--model-name", arguments["name"])
    work = Path(arguments["out_dir"]).parent
    try:
        gguf_converter.run(Path(arguments["converter"]), str(model_dir), *options, work=work, source=model_dir)
        if not path.is_file():
            raise gguf_converter.ConverterFailed("it wrote no file")
    except gguf_converter.ConverterFailed as error:
        if tells_of_full(str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise UnsupportedModel(
            f"llama.cpp's converter can't write this model: {error}.",
            remedy="Use the format 'merged'. If a newer llama.cpp supports the model, update it on the worker.",
        ) from error


def _end_ids(base_dir: Path) -> frozenset[int]:
    """Return the tokens that end an answer of the built-in engine, so that the exported model stops there too."""
    text = BaseText(base_dir)
    try:
        return text.end_ids(as_chat=True)
    except Refused:  # the chat template is missing or unusable, so no user chats with the model
        return text.end_ids(as_chat=False)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    export(Path(sys.argv[1]))
