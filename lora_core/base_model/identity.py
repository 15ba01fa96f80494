# pyright: strict
"""Hashes a base model's folder fast: a checkpoint identifies its base model by it. Does not import torch."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lora_core.runtime.safetensors_io import TensorSpan, tensor_spans

RUNS, RUN_BYTES = 4, 1024
"""Runs of bytes that are read of each tensor: the first, the last, and others evenly between them."""

OF_THE_WRITER = frozenset({"transformers_version", "_name_or_path"})
"""Fields of config.json that don't describe the model. Weights imported with a newer library have the same digest."""


def base_digest(base_dir: Path, paths: list[Path]) -> str:
    """Return the sha256 of config.json and of each tensor in `paths`: name, dtype, shape and RUNS runs of its bytes.

    The digest is that of the files. It does not depend on dtype, quantization or device in memory (quantization kernels
    may round differently on a GPU), on the process, on the folder, or on how tensors are distributed over files.
    Further training changes nearly every tensor in many places, so it changes the digest. A difference only in bytes
    that aren't read, such as the embeddings of a few tokens, is not detected. Reading everything would take seconds to
    minutes at each start. Raises UnsafeFile.
    """
    digest = hashlib.sha256(_canonical((base_dir / "config.json").read_bytes()))
    for name, tensor_digest in sorted(entry for path in paths for entry in _tensor_digests(path)):
        digest.update(hashlib.sha256(name.encode()).digest() + tensor_digest)
    return digest.hexdigest()


def _tensor_digests(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, sha256 of the bytes read) of each tensor."""
    spans = tensor_spans(path)
    with path.open("rb", buffering=0) as file:
        for name, span in spans.items():
            digest = hashlib.sha256(f"{span.dtype} {span.shape} ".encode())
            for start, count in _runs(span):
                file.seek(start)
                digest.update(file.read(count))
            yield name, digest.digest()


def _runs(span: TensorSpan) -> Iterator[tuple[int, int]]:
    """Yield (offset, number of bytes) of each run."""
    num_bytes = span.stop - span.start
    if num_bytes <= RUNS * RUN_BYTES:
        yield span.start, num_bytes
        return
    for number in range(RUNS):
        yield span.start + (num_bytes - RUN_BYTES) * number // (RUNS - 1), RUN_BYTES


def _canonical(config: bytes) -> bytes:
    """Return the canonical JSON of the config without OF_THE_WRITER."""
    settings = {name: value for name, value in json.loads(config).items() if name not in OF_THE_WRITER}
    return json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()
