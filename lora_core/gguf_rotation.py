# pyright: basic
"""Scaled rotary embeddings in a GGUF file: transformers reads the file and leaves the scaling out, without a word.

The model would be another one, only a little so for short texts. Llama 3.1 and later keep factors of their frequencies,
Phi 3.5 and 4 short and long ones, others a kind and a factor in the metadata.
"""

from pathlib import Path

from lora_core.errors import UnsupportedModel

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
KIND = ".rope.scaling.type"


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
    found += [
        f"{name} = {kind}"
        for name, field in reader.fields.items()
        if name.endswith(KIND) and (kind := field.contents()) not in ("", "none")
    ]
    if found:
        raise UnsupportedModel(
            f"{path.name} scales its rotary embeddings ({', '.join(found)}), which is lost where transformers reads "
            "GGUF files.",
            remedy="Add the model from its folder of safetensors, or from the hub.",
        )
