"""Kernels on the device against float64 and plain torch, and their time at the sizes of a base model of 8B."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import accumulate, product
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kit.compilation import left_out, why_left_out
from benchmarks.gpu.kit.kit import Kit
from benchmarks.gpu.kit.lora_pack import LoraPack, random_pack
from lora_core.kernels.gpu.attention_trial import ALL, TILED_HEADS, VisibleKeys, attention_results
from lora_core.kernels.gpu.decoding_trial import decoding_results
from lora_core.kernels.gpu.elementwise_trial import elementwise_results
from lora_core.kernels.gpu.optimizer_table import AdamwStep
from lora_core.kernels.gpu.trials import run_of
from lora_core.layers.attention import flash
from lora_core.layers.attention.cached import attend_newest
from lora_core.packing.kv_cache import SequenceCache
from lora_core.runtime.transfers import upload

FRACTION = "fraction of the largest number"
HEADS, KEY_HEADS, HEAD_SIZE = 8, 2, 64
JOBS, ROWS, VOCAB = 16, 512, 128_256


def kernels(kit: Kit) -> None:
    if kit.on_gpu:
        with kit.attempt("attention"):
            check_attention(kit)
    else:
        kit.tell_missing_gpu("varlen attention", "torch's kernel is for CUDA")
    if not kit.on_gpu and not interprets():
        kit.tell_missing_gpu("Triton kernels", "Triton compiles for a GPU; TRITON_INTERPRET=1 computes on a CPU")
        return
    for family in left_out():
        kit.tell(f"kernels for {family}", "left out", "text", reason=why_left_out(family))
    families = [family for family in CHECKS if family not in left_out()]
    for dtype, family in product((torch.bfloat16, torch.float32) if kit.on_gpu else (torch.float32,), families):
        with kit.suspecting(family):
            CHECKS[family](kit, dtype)
    if not kit.on_gpu:
        kit.tell_missing_gpu("times of kernels", "the speed of an interpreter is that of NumPy")
        return
    for family in families:
        for part in TIMES[family]:
            with kit.suspecting(family), kit.attempt(part.__name__.strip("_")):
                part(kit)


def interprets() -> bool:
    """Return whether this process computes Triton kernels on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def _check_lora(kit: Kit, dtype: torch.dtype) -> None:
    if kit.on_gpu and dtype != torch.bfloat16:
        return  # an engine does not use the kernels, which compile for minutes
    for dropout in (0.0, 0.1):
        with kit.attempt(f"segmented LoRA in {dtype}, dropout {dropout}"):
            _lora(kit, dtype, dropout)


def _check_elementwise(kit: Kit, dtype: torch.dtype) -> None:
    with kit.attempt(f"elementwise kernels in {dtype}"):
        for name, found, expected in elementwise_results(kit.device, dtype):
            difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
            kit.tell(f"{name}, {dtype}", float(difference), FRACTION)


def _check_tiled_attention(kit: Kit, dtype: torch.dtype) -> None:
    _check_heads(kit, dtype, _tiled_attention, "attention in tiles")


def _check_decoding(kit: Kit, dtype: torch.dtype) -> None:
    _check_heads(kit, dtype, _decoding, "decoding")


def _check_heads(kit: Kit, dtype: torch.dtype, check: Callable[..., None], named: str) -> None:
    for size, is_capped in product((64, 128, 256) if kit.on_gpu else (64,), (False, True)):
        if size <= TILED_HEADS[dtype]:
            with kit.attempt(f"{named} in {dtype}, heads of {size}, capped {is_capped}"):
                check(kit, dtype, size=size, is_capped=is_capped)


def _lora(kit: Kit, dtype: torch.dtype, dropout: float) -> None:
    ranks, named = kit.sizes.ranks, f"{dtype}, dropout {dropout}"
    lengths = [(7, 64, 65, 200, 1, 130)[index % 6] for index in range(len(ranks))]
    pack = random_pack(ranks, lengths, features=kit.sizes.features, dropout=dropout, dtype=dtype, device=kit.device)
    for rank, segment in zip(ranks, pack.segments, strict=True):
        with kit.attempt(f"segmented LoRA rank {rank}, {named}"):
            _lora_alone(kit, pack.alone(segment), f"segmented LoRA rank {rank}, {named}")
    found, again = pack.computed(), pack.computed()
    errors = [max(ours.differences(exact).values()) for ours, exact in zip(found, pack.reference(), strict=True)]
    kit.tell(f"segmented LoRA of all ranks in one pack, {named}", max(errors), FRACTION)
    repeated = all(one.equals(other) for one, other in zip(found, again, strict=True))
    kit.tell(f"the same bits in a second run, {named}", repeated, "yes or no")
    alone = [pack.alone(segment).computed()[0] for segment in pack.segments]
    same = [one.equals(packed) for one, packed in zip(alone, found, strict=True)]
    kit.tell(f"segments packed with the bits of segments alone, {named}", sum(same), f"of {len(ranks)} segments")
    ruined = len(ranks) // 2
    beside = pack.ruined(ruined).computed()
    kept = [found[index].equals(beside[index]) for index in range(len(ranks)) if index != ruined]
    kit.tell(f"segments unchanged next to NaN, {named}", sum(kept), f"of {len(kept)} segments")


def _lora_alone(kit: Kit, pack: LoraPack, named: str) -> None:
    """Compare one segment with float64, and for scale torch in the segment's dtype with float64."""
    (found,), (exact,), (plain,) = pack.computed(), pack.reference(), pack.reference(pack.x_TD.dtype)
    errors, usual = found.differences(exact), plain.differences(exact)
    details = {"plain_torch": max(usual.values()), "tokens": len(pack.x_TD), **errors}
    kit.tell(named, max(errors.values()), FRACTION, **details)


def _tiled_attention(kit: Kit, dtype: torch.dtype, *, size: int, is_capped: bool) -> None:
    results = attention_results(kit.device, dtype, size=size, is_capped=is_capped)
    _tell_worst(kit, results, f"in tiles, {dtype}, heads of {size}, capped {is_capped}")


def _decoding(kit: Kit, dtype: torch.dtype, *, size: int, is_capped: bool) -> None:
    results = decoding_results(kit.device, dtype, size=size, is_capped=is_capped)
    _tell_worst(kit, results, f"in decoding, {dtype}, heads of {size}, capped {is_capped}")


def _tell_worst(kit: Kit, results: Iterable[tuple[str, Tensor, Tensor]], named: str) -> None:
    worst: dict[str, float] = {}
    for name, found, expected in results:
        difference = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
        worst[name] = max(worst.get(name, 0.0), difference)
    for name, difference in worst.items():
        kit.tell(f"{name} {named}", difference, FRACTION)


def check_attention(kit: Kit) -> None:
    """Compare the varlen kernel with float32 per sequence, in the forward and the backward pass.

    The gradients of the query and the key of a sequence of one token are zero. Their difference is a fraction of the
    largest number of all sequences.
    """
    for window in (None, 100):
        inputs = [_heads(count, sum(kit.sizes.sequences), kit.device) for count in (HEADS, KEY_HEADS, KEY_HEADS)]
        d_THE = torch.randn(1, inputs[0].shape[2], HEADS, HEAD_SIZE, device=kit.device).to(torch.bfloat16)
        packed, again = (_attended(inputs, kit.sizes.sequences, d_THE, window) for _ in range(2))
        same = [torch.equal(one, other) for one, other in zip(packed, again, strict=True)]
        kit.tell(f"varlen attention, window {window}: same bits twice (y, dq, dk, dv)", str(same), "yes or no")
        stops = accumulate(kit.sizes.sequences)
        spans = [slice(stop - length, stop) for stop, length in zip(stops, kit.sizes.sequences, strict=True)]
        exact = [_exact_attention([part[:, :, rows] for part in inputs], d_THE[:, rows], window) for rows in spans]
        largest = [max(float(part.abs().max()) for part in parts) for parts in zip(*exact, strict=True)]
        for length, rows, references in zip(kit.sizes.sequences, spans, exact, strict=True):
            alone = _attended([part[:, :, rows] for part in inputs], [length], d_THE[:, rows], window)
            of_packed = [packed[0][:, rows], *(part[:, :, rows] for part in packed[1:])]
            differences = [
                float((one.float() - other).abs().max()) / (float(other.abs().max()) or of_all)
                for one, other, of_all in zip(of_packed, references, largest, strict=True)
            ]
            equal = [torch.equal(one, other) for one, other in zip(of_packed, alone, strict=True)]
            details = {"y_dq_dk_dv": str(differences), "packed_equals_alone": str(equal)}
            kit.tell(f"varlen attention, window {window}, {length} tokens", max(differences), FRACTION, **details)


def _heads(count: int, tokens: int, device: torch.device) -> Tensor:
    return torch.randn(1, count, tokens, HEAD_SIZE, device=device).to(torch.bfloat16)


def _attended(inputs: list[Tensor], lengths: Any, d_THE: Tensor, window: int | None) -> list[Tensor]:
    """Return [1, T, H, E] and the gradients of queries, keys and values, by the varlen kernel."""
    leaves = [part.detach().clone().requires_grad_() for part in inputs]
    bounds = torch.tensor([0, *lengths], device=d_THE.device).cumsum(0).to(torch.int32)
    pack = cast(Any, SimpleNamespace(sequence_lengths=tuple(lengths), sequence_bounds_S=bounds))
    query, key, value = leaves
    y = flash.attend_together(query, key, value, pack, scale=HEAD_SIZE**-0.5, causal=True, window=window)
    y.backward(d_THE)
    return [y.detach(), *(cast(Tensor, leaf.grad) for leaf in leaves)]


def _exact_attention(inputs: list[Tensor], d_THE: Tensor, window: int | None) -> list[Tensor]:
    leaves = [part.detach().float().requires_grad_() for part in inputs]
    place = torch.arange(inputs[0].shape[2], device=d_THE.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (window or len(place)))
    query, key, value = leaves
    repeated = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = F.scaled_dot_product_attention(query, *repeated, attn_mask=seen, scale=HEAD_SIZE**-0.5)
    y.transpose(1, 2).backward(d_THE.float())
    return [y.detach().transpose(1, 2), *(cast(Tensor, leaf.grad) for leaf in leaves)]


def _lora_times(kit: Kit) -> None:
    features = kit.sizes.features
    weight = torch.randn(features, features, device=kit.device).to(torch.bfloat16)
    for rank, dropout in ((16, 0.0), (16, 0.05), (64, 0.0), (128, 0.0)):
        pack = random_pack(
            [rank] * JOBS, [ROWS] * JOBS, features=features, dropout=dropout, dtype=torch.bfloat16, device=kit.device
        )
        named = f"{JOBS} segments of {ROWS} tokens, {features} features, rank {rank}, dropout {dropout}"
        run, y_TO, dx_TD = run_of([pack.segments], kit.device), pack.y0_TO.clone(), pack.x_TD.clone()
        h_tW = run.add([y_TO], pack.x_TD)

        def forward(run: Any = run, y_TO: Tensor = y_TO, pack: LoraPack = pack) -> None:
            run.add([y_TO], pack.x_TD)

        def backward(run: Any = run, dx_TD: Tensor = dx_TD, pack: LoraPack = pack, h_tW: Tensor = h_tW) -> None:
            run.add_gradients(dx_TD, [pack.dy_TO], pack.x_TD, h_tW)

        _tell_time(kit, f"LoRA forward, {named}", forward)
        _tell_time(kit, f"LoRA backward, {named}", backward)
    _tell_time(kit, "the frozen product of the same tokens", lambda: F.linear(pack.x_TD, weight))


def _attention_times(kit: Kit) -> None:
    """Time layers of Gemma 2: 9B has 16 heads of 256 features, and 27B has 32 of 128."""
    from lora_core.kernels.gpu import attention

    bounds_S = torch.arange(0, JOBS * ROWS + 1, ROWS, dtype=torch.int32, device=kit.device)
    for num_heads, size in ((16, 256), (32, 128)):
        counts = num_heads, num_heads // 2, num_heads // 2
        heads = [
            torch.randn(JOBS * ROWS, count, size, device=kit.device).to(torch.bfloat16).transpose(0, 1)
            for count in counts
        ]
        visible = VisibleKeys(scale=size**-0.5, softcap=50.0, before=ALL, after=0)
        y_THE, logs_HT = attention.attend(heads, bounds_S, ROWS, visible)
        dy_THE = torch.randn_like(y_THE)

        def forward(heads: list[Tensor] = heads, visible: VisibleKeys = visible) -> None:
            attention.attend(heads, bounds_S, ROWS, visible)

        def backward(
            heads: list[Tensor] = heads,
            visible: VisibleKeys = visible,
            given: tuple[Tensor, Tensor, Tensor] = (dy_THE, y_THE, logs_HT),
        ) -> None:
            dy_THE, y_THE, logs_HT = given
            attention.attend_backward(dy_THE, heads, y_THE, logs_HT, bounds_S, ROWS, visible)

        named = f"{JOBS} sequences of {ROWS} tokens, {num_heads} heads of {size}, capped"
        _tell_time(kit, f"attention forward, {named}", forward)
        _tell_time(kit, f"attention backward, {named}", backward)


def _decoding_times(kit: Kit) -> None:
    """Time a layer of an 8B Llama for answers of 1,024 tokens, in one launch and answer by answer."""
    from lora_core.kernels.gpu import decoding

    num_heads, num_key_heads, size, num_tokens = 32, 8, 128, 1024
    visible = VisibleKeys(scale=size**-0.5, softcap=0.0, before=ALL, after=0)
    for num_answers in (1, 16, 64):
        query, key, value = (
            torch.randn(num_answers, count, size, device=kit.device).to(torch.bfloat16).transpose(0, 1)
            for count in (num_heads, num_key_heads, num_key_heads)
        )
        caches = [SequenceCache(max_tokens=2 * num_tokens) for _ in range(num_answers)]
        for cache in caches:
            cache.extended(*(part[:, :1].expand(-1, num_tokens, -1) for part in (key, value)))
            cache.num_tokens = num_tokens
        (table_n4,) = upload([np.concatenate([cache.addresses() for cache in caches])], kit.device)

        def together(heads: Any = (query, key, value), table_n4: Tensor = table_n4) -> None:
            decoding.attend_newest(heads, table_n4, visible)

        def one_by_one(heads: Any = (query, key, value), caches: Any = caches) -> None:
            for cache in caches:
                cache.begin_pass()
            query, key, value = heads
            attend_newest(query, key, value, caches, scale=visible.scale, window=None, softcap=None)

        named = f"{num_answers} answers of {num_tokens} tokens, {num_heads} heads of {size}, {num_key_heads} of keys"
        num_bytes = 2 * num_answers * num_tokens * num_key_heads * size * query.itemsize
        _tell_time(kit, f"decoding, {named}", together, num_bytes=num_bytes)
        _tell_time(kit, f"decoding answer by answer, {named}", one_by_one, num_bytes=num_bytes)


def _elementwise_times(kit: Kit) -> None:
    from lora_core.kernels.gpu import elementwise

    tokens, features, wide = kit.sizes.tokens, kit.sizes.features, 3 * kit.sizes.features
    x, delta, dy, y, dx = (torch.randn(tokens, features, device=kit.device).to(torch.bfloat16) for _ in range(5))
    weight, rate = torch.ones(features, device=kit.device, dtype=torch.bfloat16), torch.ones(tokens, device=kit.device)
    gate, up, product = (torch.randn(tokens, wide, device=kit.device).to(torch.bfloat16) for _ in range(3))
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    logits = torch.randn(1024, VOCAB, device=kit.device).to(torch.bfloat16)
    labels, ones = torch.zeros(1024, dtype=torch.int64, device=kit.device), torch.ones(1024, device=kit.device)
    correct, nothing = torch.empty(1024, dtype=torch.bool, device=kit.device), torch.empty(0, device=kit.device)
    losses, largest, sums = (torch.ones(1024, device=kit.device) for _ in range(3))
    cos, sin = (torch.ones(tokens * 128, device=kit.device, dtype=torch.bfloat16) for _ in range(2))
    heads = features // 128
    calls: dict[str, tuple[int, Callable[[], None]]] = {
        "add_rms_norm": (4 * x.nbytes, lambda: elementwise.add_rms_norm(x, delta, weight, 1e-6, y, dx, rate)),
        "rms_norm_backward": (4 * x.nbytes, lambda: elementwise.rms_norm_backward(x, rate, weight, dy, delta, dx)),
        "swiglu": (3 * gate.nbytes, lambda: elementwise.swiglu(gate, up, product)),
        "swiglu_backward": (5 * gate.nbytes, lambda: elementwise.swiglu_backward(gate, up, product, dgate, dup)),
        "rotate": (2 * x.nbytes, lambda: elementwise.rotate(x, features, 128, cos, sin, tokens, heads, 128, False, y)),
        "score_logits": (
            logits.nbytes,
            lambda: elementwise.score_logits(logits, labels, nothing, losses, correct, largest, sums),
        ),
        "logit_gradient": (
            2 * logits.nbytes,
            lambda: elementwise.logit_gradient(logits, labels, ones, nothing, largest, sums),
        ),
    }
    for name, (num_bytes, call) in calls.items():
        _tell_time(kit, name, call, num_bytes=num_bytes)


def _optimizer_times(kit: Kit) -> None:
    from lora_core.kernels.gpu.optimizer import adamw, step_sizes

    count = 42_000_000 // 4
    vectors = [[torch.rand(count, device=kit.device) for _ in range(4)] for _ in range(4)]
    rates = {
        "clip": 1.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "rate": 1e-3,
        "plus_rate": 1e-3,
    }
    steps = [
        AdamwStep(p=p, g=g, m=m, v=v, compute=p.to(torch.bfloat16), step=1, plus=slice(0, 0), **rates)
        for p, g, m, v in vectors
    ]
    moved = 4 * count * (4 * 4 + 4 * 4 + 2)
    _tell_time(kit, "AdamW of 4 adapters, 42 million parameters in all", lambda: adamw(steps), num_bytes=moved)
    groups = [(g, p, m) for p, g, m, _ in vectors]
    _tell_time(kit, "sizes of the same steps", lambda: step_sizes(groups), num_bytes=4 * count * 12)


CHECKS: dict[str, Callable[[Kit, torch.dtype], None]] = {
    "lora": _check_lora,
    "elementwise": _check_elementwise,
    "attention": _check_tiled_attention,
    "decoding": _check_decoding,
}
TIMES: dict[str, tuple[Callable[[Kit], None], ...]] = {
    "lora": (_lora_times,),
    "elementwise": (_elementwise_times, _optimizer_times),
    "attention": (_attention_times,),
    "decoding": (_decoding_times,),
}


def _tell_time(kit: Kit, name: str, call: Callable[[], object], *, num_bytes: int | None = None) -> None:
    seconds = kit.seconds_each(call, calls=20)
    rate = {} if num_bytes is None else {"gigabytes_per_second": num_bytes / seconds / 1e9}
    kit.tell(name, 1e6 * seconds, "µs", **rate)
