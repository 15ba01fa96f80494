"""Computes logits and tokens with llama.cpp. It runs in the environment that tests/services/llama_cpp.py creates.

`python llama_cpp_program.py ARGUMENTS.json RESULT.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp_py_sync.llama import Llama  # pyright: ignore[reportMissingImports]

    ids = arguments["ids"]
    model: Any = Llama(arguments["model"], n_ctx=512, n_threads=1, type_k="f32", type_v="f32", flash_attn_type=0)
    lib, ffi = model._lib, model._ffi
    if arguments["lora"] is not None:
        adapter = lib.llama_adapter_lora_init(model._model, arguments["lora"].encode())
        assert adapter != ffi.NULL, "llama.cpp can't load the adapter"
        scales = ffi.new("float[]", [1.0])
        assert (
            lib.llama_set_adapters_lora(model._ctx, ffi.new("struct llama_adapter_lora *[]", [adapter]), 1, scales) == 0
        )
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, index, 1
        batch.seq_id[index][0], batch.logits[index] = 0, 1
    assert lib.llama_decode(model._ctx, batch) == 0
    found = lib.llama_get_logits(model._ctx)
    rows = [list(found[index * model.n_vocab : (index + 1) * model.n_vocab]) for index in range(len(ids))]
    texts = [model.tokenize(text, add_special=True, parse_special=True) for text in arguments["texts"]]
    return {"logits": rows, "tokens": texts}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
