"""Stands in for llama.cpp's converter: it writes a Gemma 3 as GGUF with the gguf package, or fails as a test asks.

`python … MODEL --outfile PATH --outtype f16 --model-name NAME`. Copied to a test's folder, next to a file `fault` with
the fault that the test asks for.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

FAULT = Path(__file__).with_name("fault")


def main(arguments: list[str], fault: str) -> None:
    if fault == "exit":
        sys.stderr.write("INFO: working\nValueError: the weights are from Mars.\n\n")
        sys.exit(3)
    if fault == "read":
        Path(__file__).parents[1].joinpath("secret").read_text()
    if fault == "memory":
        bytearray(2**45)
    if fault == "memory of numpy":
        import numpy as np

        np.zeros(2**45)
    if fault == "memory of torch":
        import torch

        torch.zeros(2**45)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if arguments != ["--help"] and fault != "nothing":
        write(Path(arguments[0]), Path(arguments[2]), arguments[6], fault)


def write(folder: Path, path: Path, name: str, fault: str) -> None:
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    writer: Any = gguf.GGUFWriter(path, "gemma3")
    writer.add_name(name)
    writer.add_head_count(config["num_attention_heads"] + (fault == "metadata"))
    writer.add_head_count_kv(config["num_key_value_heads"] * (1 + (fault == "key heads")))
    if fault != "no epsilon":
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config["vocab_size"])]
    last = {"tokens": ["other"], "fewer tokens": []}.get(fault, tokens[-1:])
    writer.add_token_list([*tokens[:-1], *last])
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config["num_hidden_layers"])
    for source, loaded in load_file(folder / "model.safetensors").items():
        values: Any = loaded
        target = names.get_name(source, try_suffixes=(".weight",))
        if fault == "weight" and "layers.3.self_attn.q_proj" in source:
            values[5, 7] *= 1.01
        if fault == "missing norm" and source == "model.norm.weight":
            continue
        if fault == "rows" and "layers.3.self_attn.q_proj" in source:
            halves = loaded.reshape(config["num_attention_heads"], 2, -1, loaded.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(loaded.shape)
        from_zero = values.ndim == 1 and fault != "norms"
        writer.add_tensor(target, values + from_zero if values.ndim == 1 else values.astype(np.float16))
    if fault == "extra":
        writer.add_tensor("output.weight", np.zeros((config["vocab_size"], config["hidden_size"]), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1:], FAULT.read_text() if FAULT.exists() else "")
