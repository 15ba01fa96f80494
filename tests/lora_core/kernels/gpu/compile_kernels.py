# pyright: standard, reportMissingImports=false
"""`python -m tests.lora_core.kernels.gpu.compile_kernels 90`: compiles every configuration that ships for a device.

It needs Triton and no GPU. Prints a line of JSON for each kernel: registers, shared memory, spills, and instructions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_core.kernels.gpu import attention, decoding, elementwise, optimizer, random_numbers, segmented_lora
from lora_core.kernels.gpu.tables import MOST_SIBLINGS, WIDTHS, TileClass
from lora_core.kernels.gpu.visible_keys import TILED_HEADS

CUOBJDUMP = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
INSTRUCTIONS = re.compile(r"\b(wgmma\.mma_async|mma\.sync|cp\.async\.c[ag]|(?:ld|st)\.global[\w.:]*)")
NARROW = re.compile(r"ld\.global(?:\.\w+)*\.[bu](?:8|16)\b|cp\.async\.ca")
"""Loads of less than four bytes, and asynchronous ones of less than 16."""
WIDE = re.compile(r"ld\.global(?:\.\w+)*\.v(?:4\.[bf]32|2\.[bf]64)|cp\.async\.cg")
INEXACT = re.compile(r"\b(?:div\.(?:full|approx)|fma\.rn|sqrt\.approx)(?:\.ftz)?\.f32")
"""Instructions whose results differ from rounding each operation by IEEE 754."""
NARROW_KERNELS = ("score logits", "whole sizes", "heads of 64", "mean squares", "scales", "factors")
"""They load a label's logit, a number of each block or line, and half a head of 32 features in eight bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """A kernel with its compile-time constants. `types` are those of its other arguments, all multiples of 16.

    `is_wide` is whether all of its vectors are loaded 16 bytes at a time. `has_64_rows` is whether its
    products have the rows that matrix instructions of compute capability 9.0 take; others use those of 8.0.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    is_product: bool
    is_wide: bool
    has_64_rows: bool = True


def configurations() -> Iterator[Configuration]:
    yield from of_lora()
    yield from of_random_numbers()
    yield from of_attention()
    yield from of_decoding()
    yield from of_rows()
    yield from of_losses()
    yield from of_steps()


def of_lora() -> Iterator[Configuration]:
    """Each distinct configuration of the three kernels, for all classes of segments."""
    rows = ("h", "y", *(f"{name}{sibling}" for name in "xy" for sibling in range(MOST_SIBLINGS)))
    types = dict.fromkeys(rows, "*bf16") | dict.fromkeys(("entries", "tiles", "spans", "joins"), "*i64")
    types |= dict.fromkeys(("width", *(f"width{sibling}" for sibling in range(MOST_SIBLINGS))), "i32")
    names, numbers = ("shrink", "expand", "accumulate"), range(1, MOST_SIBLINGS + 1)
    seen: set[str] = set()
    for width, is_aligned, has_dropout, name, by_b, number in product(
        WIDTHS, (True, False), (False, True), names, (True, False), numbers
    ):
        if number > 1 and not by_b:
            continue  # siblings share the input of A
        kind = TileClass(width=width, is_aligned=is_aligned, has_dropout=has_dropout)
        constants = segmented_lora.CONSTANTS[name](kind, by_b=by_b, num_siblings=number)
        marks = [mark for mark in ("DROPOUT", "ALIGNED") if constants.get(mark)]
        label = f"{name} by {'B' if by_b else 'A'}, width {width} {' '.join(marks).lower()}"
        label += f", {number} linears" if number > 1 else ""
        if label not in seen:
            seen.add(label)
            of_sum = name == "expand" and not by_b
            yield Configuration(
                name=label,
                kernel=segmented_lora._expand_sum if of_sum else getattr(segmented_lora, f"_{name}"),
                constants=constants,
                types=types,
                is_product=True,
                is_wide=bool(constants.get("ALIGNED", True)),
            )


def of_random_numbers() -> Iterator[Configuration]:
    keys = {"key": "i64", "next_key": "i64", "num_elements": "i32"}
    yield Configuration(
        name="dropout mask",
        kernel=random_numbers._draw_mask,
        constants={"M": random_numbers.ROWS, "K": random_numbers.COLUMNS, **random_numbers.OPTIONS},
        types={"keep": "*u8", **keys, "threshold": "i32"},
        is_product=False,
        is_wide=False,
    )
    yield Configuration(
        name="uniform numbers",
        kernel=random_numbers._draw_within,
        constants={"W": random_numbers.WORDS, **random_numbers.OPTIONS},
        types={"out": "*fp32", "bounds": "*fp64", **keys, "num_columns": "i32"},
        is_product=False,
        is_wide=False,
    )


def of_attention() -> Iterator[Configuration]:
    """Heads of each width, in both dtypes, with capped scores and without."""
    directions: tuple[Literal["forward", "queries", "keys"], ...] = ("forward", "queries", "keys")
    kernels = dict(
        zip(directions, (attention._attend, attention._query_gradient, attention._key_gradients), strict=True)
    )
    names = ("num_tiles", "num_heads", "group", "size", "num_tokens", "before", "after")
    strides = (f"{part}_{of}" for part in "qkv" for of in ("token", "head"))
    types = dict.fromkeys((*names, *strides), "i32") | dict.fromkeys(("inner", "scale", "softcap"), "fp32")
    types |= dict.fromkeys(("logs", "means"), "*fp32") | {"bounds": "*i32"}
    for size, dtype, capped, direction in product((32, 64, 128, 256), TILED_HEADS, (True, False), directions):
        if size > TILED_HEADS[dtype]:
            continue
        is_half = dtype == torch.bfloat16
        heads = dict.fromkeys(("q", "k", "v", "y", "dy", "dq", "dk", "dv"), "*bf16" if is_half else "*fp32")
        constants = attention.tile_constants(dtype, size, direction)
        yield Configuration(
            name=f"attention, {direction}, heads of {size} in {str(dtype).removeprefix('torch.')}, capped {capped}",
            kernel=kernels[direction],
            constants=constants | {"CAPPED": capped},
            types=types | heads,
            is_product=True,
            is_wide=is_half,
            has_64_rows=constants["N" if direction == "keys" else "M"] == 64,
        )


def of_decoding() -> Iterator[Configuration]:
    """Heads of each padded width and of some sizes between them, in both dtypes, with capped scores and without."""
    types = dict.fromkeys(("inner", "softcap"), "fp32") | dict.fromkeys(("group", "num_before"), "i32")
    for size, dtype, capped in product((32, 64, 80, 96, 128, 256), TILED_HEADS, (True, False)):
        heads = dict.fromkeys(("q", "k", "v", "y"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
        yield Configuration(
            name=f"decoding, heads of {size} in {str(dtype).removeprefix('torch.')}, capped {capped}",
            kernel=decoding._attend_newest,
            constants=decoding.tile_constants(dtype, size) | {"CAPPED": capped},
            types=types | heads | {"table": "*i64"},
            is_product=True,
            is_wide=True,
            has_64_rows=False,
        )


def of_rows() -> Iterator[Configuration]:
    """Norms of 576 to 8192 features, the gated activation, and rotations of whole heads and of parts."""
    rows = ("x", "delta", "weight", "total", "y", "dy", "onward", "dx")
    half = dict.fromkeys((*rows, "gate", "up", "dgate", "dup"), "*bf16")
    heads = dict.fromkeys(("source", "cos", "sin", "target"), "*bf16")
    numbers = dict.fromkeys(("width", "count", "token_stride", "head_stride", "num_heads", "size", "rotated"), "i32")
    types = half | heads | numbers | {"rate": "*fp32", "eps": "fp32"}
    for features, added in product((576, 2048, 4096, 8192), (False, True)):
        of_rows = elementwise._of_rows(features)
        yield plain(f"norm, {features} features, sum {added}", elementwise._rms_norm, types, HAS_DELTA=added, **of_rows)
        label = f"norm backward, {features} features, sum {added}"
        yield plain(label, elementwise._rms_norm_backward, types, HAS_ONWARD=added, **of_rows)
        if not added:
            yield plain(f"norm with rate, {features} features", elementwise._rms_norm_with_rate, types, **of_rows)
    for name in ("swiglu", "swiglu_backward"):
        yield plain(name, getattr(elementwise, f"_{name}"), types, BLOCK=elementwise.BLOCK, **elementwise.OPTIONS)
    for heads_and_half, rest, backward in product(((32, 64), (64, 64), (16, 32)), (0, 64), (False, True)):
        constants = {"H": heads_and_half[0], "HALF": heads_and_half[1], "REST": rest, "BACKWARD": backward}
        label = f"rotate, {heads_and_half[0]} heads of {2 * heads_and_half[1]} + {rest}, backward {backward}"
        yield plain(label, elementwise._rotate, types, **constants, **elementwise.OPTIONS)


def of_losses() -> Iterator[Configuration]:
    floats = dict.fromkeys(("smoothing", "losses", "largest", "sums", "weights"), "*fp32")
    types = floats | {"logits": "*bf16", "labels": "*i64", "correct": "*i1", "num_classes": "i32"}
    for smoothed in (False, True):
        scored = {"BLOCK": elementwise.SCORED_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
        yield plain(f"score logits, smoothed {smoothed}", elementwise._score_logits, types, SMOOTHED=smoothed, **scored)
        constants = {"SMOOTHED": smoothed, "BLOCK": elementwise.BLOCK, **elementwise.OPTIONS}
        yield plain(f"gradient of logits, smoothed {smoothed}", elementwise._logit_gradient, types, **constants)


def of_steps() -> Iterator[Configuration]:
    types = {"table": "*i64", "partial": "*fp32", "sizes": "*fp32", "num_blocks": "i32"}
    for aligned, copied in product((True, False), (True, False)):
        constants = {"BLOCK": optimizer.BLOCK, "ALIGNED": aligned, "HAS_COPY": copied, **optimizer.OPTIONS}
        yield plain(f"AdamW, aligned {aligned}, copy {copied}", optimizer._adamw, types, **constants)
    constants = {"BLOCK": optimizer.SIZED_BLOCK, **optimizer.OPTIONS}
    for aligned in (True, False):
        yield plain(f"partial sizes, aligned {aligned}", optimizer._partial_sizes, types, ALIGNED=aligned, **constants)
    yield plain("whole sizes", optimizer._whole_sizes, types, MANY=1024, **constants)


def plain(name: str, kernel: Any, types: dict[str, str], **constants: Any) -> Configuration:
    """Return the configuration of a kernel without matrix products."""
    is_wide = constants.get("ALIGNED", True) and not any(part in name for part in NARROW_KERNELS)
    return Configuration(name=name, kernel=kernel, constants=constants, types=types, is_product=False, is_wide=is_wide)


def compiled(configuration: Configuration, capability: int) -> dict[str, Any]:
    """Return the figures of one configuration."""
    constants = {name: value for name, value in configuration.constants.items() if name not in OPTIONS}
    options = {name: value for name, value in configuration.constants.items() if name in OPTIONS}
    arguments = configuration.kernel.arg_names
    signature = {name: "constexpr" if name in constants else configuration.types[name] for name in arguments}
    kernel = configuration.kernel
    general = set(kernel.do_not_specialize)
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or kind == "i32") and name not in general
    }
    source = ASTSource(configuration.kernel, signature, constants, divisible)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = used(binary.asm["cubin"])
    return {
        "name": configuration.name,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": binary.metadata.shared,
        "instructions": Counter(INSTRUCTIONS.findall(binary.asm["ptx"])),
        "narrow_loads": len(NARROW.findall(binary.asm["ptx"])),
        "wide_loads": len(WIDE.findall(binary.asm["ptx"])),
        "inexact": len(INEXACT.findall(binary.asm["ptx"])),
        "is_product": configuration.is_product,
        "is_wide": configuration.is_wide,
        "has_64_rows": configuration.has_64_rows,
    }


def used(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of spilled registers of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout + done.stderr
    return int(found[1]), int(found[2]) + int(found[3])


def main(capability: int) -> None:
    for configuration in configurations():
        sys.stdout.write(json.dumps(compiled(configuration, capability)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)  # Triton's about a default that the configurations set themselves
    main(int(sys.argv[1]))
