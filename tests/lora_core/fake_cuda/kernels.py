"""Stand-ins for the modules of Triton kernels: they count launches and multiplications, and return tensors of the sizes
of the results."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels.gpu.optimizer_table import NUM_WORDS, AdamwStep
from lora_core.kernels.gpu.tables import TileGroup
from lora_core.runtime.transfers import upload
from tests.lora_core.fake_cuda.observer import DeviceObserver

PACKAGE = "lora_core.kernels.gpu"
ELEMENTWISE = (
    *("swiglu", "swiglu_backward", "rms_norm", "add_rms_norm", "rms_norm_with_rate", "rms_norm_backward", "rotate"),
    *("score_logits", "logit_gradient"),
)


def stand_ins(observer: DeviceObserver) -> dict[str, ModuleType]:
    """Return the modules by their full names. Without Triton, the real ones can't be imported."""

    def launch(name: str, *_: Any) -> None:
        with observer.kernel(name):
            pass

    def elementwise(name: str) -> Callable[..., None]:
        return lambda *_: launch(name)

    def count_flops(group: TileGroup, num_shared: int, tensors: Sequence[Tensor]) -> None:
        """Count products with features that the siblings share, and with those of each. All have the same rows."""
        features = len(tensors) * num_shared + sum(tensor.shape[1] for tensor in tensors)
        observer.counts.flops += 2 * group.num_rows // group.num_siblings * group.kind.width * features

    def add_lora(outputs: Sequence[Tensor], x_TD: Tensor, entries: Tensor, group: TileGroup) -> Tensor:
        launch("shrink")
        launch("expand")
        count_flops(group, x_TD.shape[1], outputs)
        return x_TD.new_empty(group.num_rows, group.kind.width)

    def add_lora_gradients(
        dx_TD: Tensor | None,
        gradients: Sequence[Tensor],
        x_TD: Tensor,
        h_tW: Tensor,
        entries: Tensor,
        group: TileGroup,
    ) -> None:
        torch.empty_like(h_tW)
        for name in ("shrink", "accumulate", "accumulate", *(() if dx_TD is None else ("expand",))):
            launch(name)
        count_flops(group, 0, gradients)
        count_flops(group, x_TD.shape[1] * (1 if dx_TD is None else 2), gradients)

    def attend(heads: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
        launch("attention")
        num_heads, num_tokens, size = heads[0].shape
        rows = heads[0].new_empty(num_heads, num_tokens, dtype=torch.float32)
        return heads[0].new_empty(num_tokens, num_heads, size), rows

    def attend_backward(dy_THE: Tensor, heads: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
        launch("attention, queries")
        launch("attention, keys")
        return tuple(part.new_empty(part.shape[1], len(part), part.shape[2]) for part in heads)

    def adamw_launches(steps: Sequence[AdamwStep]) -> list[Callable[[], None]]:
        upload([np.zeros((len(steps), NUM_WORDS), np.int64)], steps[0].p.device)
        return [lambda: launch("adamw")]

    def step_sizes(vectors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        upload([np.zeros((len(vectors), 5), np.int64)], vectors[0][0].device)
        launch("partial sizes")
        launch("whole sizes")
        return torch.empty(len(vectors), 3, device=vectors[0][0].device)

    return {
        f"{PACKAGE}.attention": _module(attend=attend, attend_backward=attend_backward),
        f"{PACKAGE}.decoding": _module(attend_newest=partial(_attend_newest, observer)),
        f"{PACKAGE}.elementwise": _module(**{name: elementwise(name) for name in ELEMENTWISE}),
        f"{PACKAGE}.random_numbers": _module(
            draw_mask=partial(_draw_mask, observer), draw_within=partial(_draw_within, observer)
        ),
        f"{PACKAGE}.segmented_lora": _module(add_lora=add_lora, add_lora_gradients=add_lora_gradients),
        f"{PACKAGE}.optimizer": _module(adamw_launches=adamw_launches, step_sizes=step_sizes),
    }


def _attend_newest(observer: DeviceObserver, heads: Sequence[Tensor], *_: Any) -> Tensor:
    by_token = [part.transpose(0, 1).contiguous() for part in heads]
    with observer.kernel("attention of newest tokens"):
        return torch.empty_like(by_token[0])


def _draw_mask(observer: DeviceObserver, _key: Any, _threshold: int, like: Tensor) -> Tensor:
    with observer.kernel("dropout mask"):
        return like.new_empty(like.shape, dtype=torch.uint8)


def _draw_within(observer: DeviceObserver, _key: Any, bounds_M: Tensor, num_columns: int) -> Tensor:
    with observer.kernel("uniform numbers"):
        return bounds_M.new_empty(len(bounds_M), num_columns, dtype=torch.float32)


def _module(**functions: Any) -> ModuleType:
    made = ModuleType("stand_in")
    vars(made).update(functions)
    return made
