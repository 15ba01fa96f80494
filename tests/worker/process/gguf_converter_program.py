"""Stands in for llama.cpp's converter: it writes a Gemma 3 as GGUF with the gguf package, or fails as a test asks.

`python … MODEL --outfile PATH --outtype f16 --model-name NAME`. Copied to a test's folder, next to a file `fault` with
the fault that the test asks for.
"""

import json
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
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list([*tokens[:-1], "other"] if fault == "tokens" else tokens)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config["num_hidden_layers"])
    for source, values in load_file(folder / "model.safetensors").items():
        target = names.get_name(source, try_suffixes=(".weight",))
        if fault == "weight" and "layers.3.self_attn.q_proj" in source:
            values[5, 7] *= 1.01
        if fault == "missing norm" and source == "model.norm.weight":
            continue
        writer.add_tensor(target, values + 1 if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1:], FAULT.read_text() if FAULT.exists() else "")
