# pyright: strict
"""Which base model a folder holds, told in milliseconds: a checkpoint names the one that its job began on. No torch."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lora_core.runtime.safetensors_io import TensorSpan, tensor_spans

RUNS, RUN_BYTES = 4, 1024
"""Of each tensor so many runs of bytes are read: the first, the last, and others evenly between them."""

OF_THE_WRITER = frozenset({"transformers_version", "_name_or_path"})
"""Fields of config.json that say nothing of the model: the same weights imported with a newer library are the same."""


def base_digest(base_dir: Path, paths: list[Path]) -> str:
    """sha256 of config.json, and of each tensor in `paths` by name: its dtype, its shape and RUNS of its bytes.

    It is of the files, and not of what was made of them: so it is one digest in whatever dtype, quantization and on
    whatever device the base is held (kernels that quantize may round otherwise on a GPU), in any process, for a copy
    of the folder, and however tensors are shared out among files. Training a model further changes nearly every
    tensor in many places, so it is seen. What differs in nothing but numbers that aren't read, as in the embeddings of
    a few tokens, is not: all bytes of a base would take seconds to minutes at every start.
    """
    digest = hashlib.sha256(_canonical((base_dir / "config.json").read_bytes()))
    for name, told in sorted(entry for path in paths for entry in _tensor_digests(path)):
        digest.update(hashlib.sha256(name.encode()).digest() + told)
    return digest.hexdigest()


def _tensor_digests(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, sha256 of what is read) of each tensor."""
    spans = tensor_spans(path)
    with path.open("rb", buffering=0) as file:
        for name, span in spans.items():
            digest = hashlib.sha256(f"{span.dtype} {span.shape} ".encode())
            for start, count in _runs(span):
                file.seek(start)
                digest.update(file.read(count))
            yield name, digest.digest()


def _runs(span: TensorSpan) -> Iterator[tuple[int, int]]:
    """(where it starts, how many bytes)."""
    num_bytes = span.stop - span.start
    if num_bytes <= RUNS * RUN_BYTES:
        yield span.start, num_bytes
        return
    for number in range(RUNS):
        yield span.start + (num_bytes - RUN_BYTES) * number // (RUNS - 1), RUN_BYTES


def _canonical(config: bytes) -> bytes:
    """Without what tells of how the file was written."""
    told = {name: value for name, value in json.loads(config).items() if name not in OF_THE_WRITER}
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
