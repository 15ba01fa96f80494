"""Profile of one step of the engine by part, from torch's profiler and named ranges around Lorry's functions.

The own time of each event counts once: for the part of the innermost range around it, or of its autograd node. A
backward belongs to the part whose forward created the node, unless it contains a range itself. The parts therefore add
up to the step.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from lora_core.base_model.model import BaseModel
from lora_core.layers.attention.dense_cpu import MatrixAttention
from lora_core.layers.rms_norm import AddRmsNorm, RmsNorm
from lora_core.layers.rotary import Rotate
from lora_core.layers.swiglu import SwiGlu

Result = TypeVar("Result")
PREFIX = "part: "
WHOLE = "step"
NODE = "autograd::engine::evaluate_function: "
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul", "aten::bmm", "aten::baddbmm")
COPIES = ("aten::copy_", "aten::cat", "aten::clone", "aten::_to_copy", "aten::contiguous")
BY_CLASS = (("RMSNorm", "norms"), ("LayerNorm", "norms"), ("MLP", "gated activation"), ("RotaryEmbedding", "RoPE"))
"""Suffixes of module class names."""
BY_FUNCTION = {
    "add_lora": "LoRA",
    "add_lora_gradients": "LoRA",
    "received_by_lora": "LoRA",
    "add_through_dropout": "LoRA",
    "_add_joint": "LoRA",
    "_add_joint_gradients": "LoRA",
    "packed_attention": "attention",
    "apply_rotary_pos_emb": "RoPE",
    "loss_by_head": "head and loss",
    "step_sizes": "optimizer",
    "stays_finite": "optimizer",
    "optimizer_step": "optimizer",
    "build_pack": "data and bookkeeping",
}
"""Global functions by name, in any module of lora_core or of transformers' models."""
BY_NODE = {
    RmsNorm.__name__: "norms",
    AddRmsNorm.__name__: "norms",
    SwiGlu.__name__: "gated activation",
    Rotate.__name__: "RoPE",
    MatrixAttention.__name__: "attention",
}
"""Autograd functions that Lorry's patched blocks call directly, so that no module or global name can get a range. The
profiler has an event with the class name of each."""


def profile_of(base: BaseModel, step: Callable[[], Result]) -> tuple[dict[str, float], float, Result]:
    """Return (seconds by part, seconds of the step under the profiler, the step's result)."""
    events, whole, returned = events_of(base, step)
    seconds: defaultdict[str, float] = defaultdict(float)
    for part, event in events:
        seconds[part] += event.self_cpu_time_total / 1e6
    return dict(seconds), whole.cpu_time_total / 1e6, returned


def events_of(base: BaseModel, step: Callable[[], Result]) -> tuple[list[tuple[str, Any]], Any, Result]:
    """Return ((part, event) of each event within the step, the step's own event, the step's result)."""
    with _ranges(base), profile(activities=[ProfilerActivity.CPU]) as found, record_function(WHOLE):
        returned = step()
    events: list[Any] = list(found.events() or ())
    (whole,) = (event for event in events if event.name == WHOLE)
    parent_of = {id(child): event for event in events for child in event.cpu_children}
    made_in = _parts_of_nodes(events, parent_of)
    within = [event for event in events if event is whole or _is_within(event, whole, parent_of)]
    return [(_part(event, parent_of, made_in), event) for event in within], whole, returned


@contextmanager
def _ranges(base: BaseModel) -> Iterator[None]:
    """Add a profiler range to modules and functions within the block."""
    assert base.attachment is not None
    linears = {id(linear) for linear in base.attachment.linears.values()}
    with ExitStack() as stack:
        for module in base.model.modules():
            name = type(module).__name__
            part = next((part for end, part in BY_CLASS if name.endswith(end)), None)
            part = "linears" if id(module) in linears else part
            if part is not None:
                stack.enter_context(patch.object(module, "forward", _named(part, module.forward)))
        for module in [
            module for name, module in sys.modules.items() if name.startswith(("lora_core", "transformers.models"))
        ]:
            for name, part in BY_FUNCTION.items():
                function = vars(module).get(name)
                if callable(function):
                    stack.enter_context(patch.object(module, name, _named(part, function)))
        _name_attention(stack)
        yield


def _name_attention(stack: ExitStack) -> None:
    """Name the attention function, of which transformers has registered a reference."""
    from transformers import AttentionInterface

    from lora_core.layers.attention import packed

    registered = AttentionInterface()[packed.NAME]
    AttentionInterface.register(packed.NAME, _named("attention", registered))
    stack.callback(AttentionInterface.register, packed.NAME, registered)


def _named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def named(*arguments: Any, **options: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*arguments, **options)

    return named


def _parts_of_nodes(events: list[Any], parent_of: dict[int, Any]) -> dict[int, str]:
    """Return the part whose forward created each autograd node, by sequence number."""
    return {
        event.sequence_nr: part
        for event in events
        if event.sequence_nr >= 0 and not event.name.startswith(NODE) and (part := _range_of(event, parent_of))
    }


def _part(event: Any, parent_of: dict[int, Any], made_in: dict[int, str]) -> str:
    part = _range_of(event, parent_of) or _node_part(event, parent_of, made_in)
    if part == "linears":
        return "base matmuls" if event.name in PRODUCTS else "linears: other operations"
    if part is None and event.name in COPIES:
        return "copies outside all parts"
    if part is None:
        return "Python and additions between parts"
    return part


def _range_of(event: Any, parent_of: dict[int, Any]) -> str | None:
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name in BY_NODE:
            return BY_NODE[event.name]
        event = parent_of.get(id(event))
    return None


def _node_part(event: Any, parent_of: dict[int, Any], made_in: dict[int, str]) -> str | None:
    while event is not None:
        if event.name.startswith(NODE):
            return made_in.get(event.sequence_nr)
        event = parent_of.get(id(event))
    return None


def _is_within(event: Any, whole: Any, parent_of: dict[int, Any]) -> bool:
    while (parent := parent_of.get(id(event))) is not None:
        if parent is whole:
            return True
        event = parent
    return False
