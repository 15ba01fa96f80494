# pyright: basic
"""Detects scaled rotary embeddings in a GGUF file, because transformers drops the scaling silently on import.

The imported model would be slightly wrong, mostly for long texts. Llama 3.1 and later store factors of their
frequencies, Phi 3.5 and 4 short and long factors, and others a scaling type and a factor in the metadata.
"""

from pathlib import Path

from lora_core.errors import UnsupportedModel

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
KIND = ".rope.scaling.type"
AMOUNTS = (".rope.scaling.factor", ".rope.scale_linear")
"""Metadata keys of the factor. Without a type the scaling is linear. 0 and 1 mean none. The second key is older."""


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
