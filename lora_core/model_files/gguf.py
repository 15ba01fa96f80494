# pyright: basic
"""Checks the rotary embeddings of a GGUF file, and finds a chat template next to it.

Transformers drops the scaling of rotary embeddings silently. The imported model would be slightly wrong, mostly for
long texts. Llama 3.1 and later store factors of their frequencies, Phi 3.5 and 4 short and long factors, and others a
scaling type and a factor in the metadata.
"""

import json
import logging
from pathlib import Path
from typing import Any

from lora_core.errors import UnsupportedModel

LOGGER = logging.getLogger(__name__)
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
KIND = ".rope.scaling.type"
AMOUNTS = (".rope.scaling.factor", ".rope.scale_linear")
"""Metadata keys of the factor. Without a type the scaling is linear. 0 and 1 mean none. The second key is older."""
TOKENIZER = "tokenizer_config.json"
"""File next to a GGUF file that may contain a chat template; see worker.process.sandbox."""
MAX_BYTES = 2**24
"""Its maximum size."""


def template_beside(path: Path) -> str | None:
    """Return the chat template in the tokenizer's configuration next to a GGUF file, or None.

    The configuration may belong to another model in the same folder, so a file that can't be read is ignored.
    """
    tokenizer = path.with_name(TOKENIZER)
    try:
        with tokenizer.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        config: Any = json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        LOGGER.warning("The chat template of %s is ignored: %s", tokenizer, error)
        return None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):  # named templates
        defaults = (each for each in found if isinstance(each, dict) and each.get("name") == "default")
        found = next(defaults, {}).get("template")
    return found if isinstance(found, str) else None


def refuse_scaled_rotation(path: Path) -> None:
    """Raise UnsupportedModel if the file has scaled rotary embeddings or can't be read."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UnsupportedModel(
            f"{path.name} can't be read as a GGUF file ({error}).",
            remedy="Download the file again: it may be incomplete.",
        ) from error
    found = [tensor.name for tensor in reader.tensors if tensor.name in FACTORS]
    metadata = {name: field.contents() for name, field in reader.fields.items() if name.endswith((KIND, *AMOUNTS))}
    kind = next((value for name, value in metadata.items() if name.endswith(KIND)), "linear")
    factors = [value for name, value in metadata.items() if name.endswith(AMOUNTS)]
    is_plain = kind in ("", "none") or (kind == "linear" and all(factor in (0, 1) for factor in factors))
    found += [] if is_plain else [f"{name} = {value}" for name, value in metadata.items()]
    if found:
        raise UnsupportedModel(
            f"{path.name} scales its rotary embeddings ({', '.join(found)}), but transformers ignores the scaling in "
            "GGUF files.",
            remedy="Add the model from a safetensors folder or from the Hub.",
        )
