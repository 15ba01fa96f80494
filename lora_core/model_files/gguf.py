# pyright: basic
"""Scaled rotary embeddings in a GGUF file: transformers reads the file and leaves the scaling out, without a word.

The model would be another one, only a little so for short texts. Llama 3.1 and later keep factors of their frequencies,
Phi 3.5 and 4 short and long ones, others a kind and a factor in the metadata.
"""

from pathlib import Path

from lora_core.errors import UnsupportedModel

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
KIND = ".rope.scaling.type"
AMOUNTS = (".rope.scaling.factor", ".rope.scale_linear")
"""Without a kind they mean a linear one; 0 and 1 scale nothing. The second is older."""


def refuse_scaled_rotation(path: Path) -> None:
    """Raises UnsupportedModel where the file has any."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UnsupportedModel(
            f"{path.name} can't be read as a GGUF file ({error}).", remedy="Download it anew: it may be cut off."
        ) from error
    found = [tensor.name for tensor in reader.tensors if tensor.name in FACTORS]
    told = {name: field.contents() for name, field in reader.fields.items() if name.endswith((KIND, *AMOUNTS))}
    kind = next((value for name, value in told.items() if name.endswith(KIND)), "linear")
    factors = [value for name, value in told.items() if name.endswith(AMOUNTS)]
    is_plain = kind in ("", "none") or (kind == "linear" and all(factor in (0, 1) for factor in factors))
    found += [] if is_plain else [f"{name} = {value}" for name, value in told.items()]
    if found:
        raise UnsupportedModel(
            f"{path.name} scales its rotary embeddings ({', '.join(found)}), which is lost where transformers reads "
            "GGUF files.",
            remedy="Add the model from its folder of safetensors, or from the hub.",
        )
