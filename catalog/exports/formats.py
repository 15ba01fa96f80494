"""The formats of exports, which models each can contain, and the Hub repositories to which they may be uploaded. Pure.

Workers upload with their own token, which may write to repositories of other projects. The operator therefore lists the
allowed repositories in LORRY_HUB_REPOSITORIES. The API server checks the list when an export is created, and the worker
checks its own list before it uploads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from catalog.errors import Forbidden, InvalidRequest

Format = Literal["adapter", "merged", "gguf", "gguf-lora"]
Quantization = Literal["f16", "q8_0"]
DEFAULT_QUANTIZATION: Quantization = "q8_0"
HUB_REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
GGUF_ARCHITECTURES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"},
)
"""Classes of base models that Lorry itself writes as GGUF. A test compares them with those of lora_core."""
BYTES_OF_VALUE = {"f16": 2.0, "q8_0": 34 / 32}
PROCESS_BYTES = 2**30
"""Memory of an export's process without any weights, most of it for torch."""
COPIES = 2
"""Copies of the merged weights in memory, while the result is compared with the adapted model. Measured: 1.5 to 1.9."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Estimated needs of an export on its worker, in bytes."""

    scratch_bytes: int
    """Disk space for its files until they are stored, without those of the adapter."""
    stored_bytes: int
    """Space in the artifact store."""
    memory_bytes: int
    """Memory of the process that merges and verifies."""


def resolve(format: Format, quantization: Quantization | None, *, hub_repository: str | None) -> Quantization | None:  # noqa: A002
    """Return the quantization, with its default. Raises InvalidRequest for options that don't belong together."""
    if format == "gguf":
        return quantization or DEFAULT_QUANTIZATION
    if quantization is not None:
        raise InvalidRequest("export_not_quantizable", format=format, param="quantization")
    if format == "adapter" and hub_repository is None:
        raise InvalidRequest("export_of_adapter_files", param="format")
    return None


def is_written_by_lorry(description: dict[str, Any]) -> bool:
    """Return whether Lorry itself writes GGUF files of this base model. Otherwise, llama.cpp's converter may."""
    return description.get("architecture") in (None, *GGUF_ARCHITECTURES)


def check_model(
    format: Format,  # noqa: A002
    *,
    description: dict[str, Any],
    lora: dict[str, Any],
    has_converter: bool,
) -> None:
    """Raises InvalidRequest if the format can't contain the adapter.

    description: of the base model. lora: of the adapter's job. has_converter: a running worker has llama.cpp's
    converter. A worker checks the rest, such as the tokenizer.
    """
    if format not in ("gguf", "gguf-lora"):
        return
    if not is_written_by_lorry(description):
        _check_converter(format, architecture=description["architecture"], has_converter=has_converter)
    if format == "gguf-lora" and lora.get("use_dora"):
        raise InvalidRequest("dora_not_exportable", param="format")


def _check_converter(format: Format, *, architecture: str, has_converter: bool) -> None:  # noqa: A002
    if format == "gguf-lora":
        raise InvalidRequest(
            "architecture_not_exportable",
            architecture=architecture,
            format="gguf" if has_converter else "merged",
            gguf_architectures=", ".join(sorted(GGUF_ARCHITECTURES)),
            param="format",
        )
    if not has_converter:
        raise InvalidRequest(
            "converter_not_configured",
            architecture=architecture,
            gguf_architectures=", ".join(sorted(GGUF_ARCHITECTURES)),
            param="format",
        )


def estimated_bytes(
    format: Format,  # noqa: A002
    quantization: str | None,
    *,
    description: dict[str, Any],
    adapter_parameters: int,
) -> int:
    """Return the approximate size of the files that an export stores."""
    if format == "adapter":
        return 0
    if format == "gguf-lora":
        return 4 * adapter_parameters
    values = int(description.get("num_parameters") or 0)
    if quantization is not None:
        return int(values * BYTES_OF_VALUE[quantization])
    return values * (4 if description.get("dtype") == "float32" else 2)


def needs(format: str, quantization: str | None, *, description: dict[str, Any], stored_bytes: int) -> Needs:  # noqa: A002
    """Return what an export needs.

    description: of the base model. stored_bytes: as `estimated_bytes` returns them. For GGUF, the merged model is first
    written in 32 bits.
    """
    if format == "adapter":
        return Needs(scratch_bytes=0, stored_bytes=0, memory_bytes=0)
    values = int(description.get("num_parameters") or 0)
    bytes_of_value = 2 if format == "merged" and description.get("dtype") != "float32" else 4
    return Needs(
        scratch_bytes=stored_bytes + (4 * values if format == "gguf" else 0),
        stored_bytes=stored_bytes,
        memory_bytes=PROCESS_BYTES + COPIES * bytes_of_value * values,
    )


def check_hub_repository(repository: str, allowed: Collection[str]) -> None:
    """Raises Forbidden if no pattern of `allowed`, such as `my-org/*`, matches the repository (ORG/NAME)."""
    if any(fnmatchcase(repository, pattern) for pattern in allowed):
        return
    organization = repository.partition("/")[0]
    raise Forbidden(
        "hub_repository_not_allowed" if allowed else "no_hub_repository_allowed",
        repository=repository,
        organization=organization,
        param="hub_repository",
    )
