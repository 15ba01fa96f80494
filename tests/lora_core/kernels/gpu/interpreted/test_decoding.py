"""The kernel equals attention answer by answer, and an answer's bits do not depend on the other answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import Attachment
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.forward.generation import Prompts
from lora_core.kernels.kv_cache import SequenceCache
from lora_core.kernels.selection import Kernels
from lora_core.layers.attention.cached import attend_last, attend_newest
from lora_core.packing.packed_batch import running
from tests.lora_core.kernels.gpu.launches import recorded
from tests.lora_core.layers.attention.test_flash import pack_of
from tests.lora_core.scenarios import admit, submissions

LENGTHS = (1, 5, 16, 17, 300)
"""Tokens in the cache of each answer: one has several tiles."""
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"window": None, "softcap": None},
    "newest alone": {"window": 1, "softcap": None},
    "window": {"window": 16, "softcap": None},
    "capped": {"window": None, "softcap": 3.0},
    "capped with a window": {"window": 39, "softcap": 50.0},
}
CAPACITY, UNUSED = 512, 7.5


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads_of(num_heads: int, num_key_heads: int, size: int) -> list[Tensor]:
    """Return q, k and v, [heads, n, E], as views of rows by token."""
    counts = num_heads, num_key_heads, num_key_heads
    return [numbers(len(LENGTHS), count, size, seed=seed).transpose(0, 1) for seed, count in enumerate(counts)]


def caches_of(num_key_heads: int, size: int, lengths: Sequence[int] = LENGTHS) -> list[SequenceCache]:
    """Return caches of these lengths, whose numbers depend on the length alone, with UNUSED behind them."""
    caches = []
    for length in lengths:
        own, empty = SequenceCache(max_tokens=CAPACITY), torch.empty(num_key_heads, CAPACITY, size)
        for seed, buffer in enumerate(own.reserved(empty, empty)):
            buffer.fill_(UNUSED)
            buffer[:, :length] = numbers(num_key_heads, length, size, seed=10 * length + seed)
        own.num_tokens = length
        caches.append(own)
    return caches


def buffers_of(own: SequenceCache) -> tuple[Tensor, Tensor]:
    ((keys, values),) = own._of_calls
    return keys, values


def decoded(heads: Sequence[Tensor], caches: Sequence[SequenceCache], scale: float = 0.4, **options: Any) -> Tensor:
    """Return y [n, H, E] of the kernel."""
    table_Cn4 = torch.from_numpy(np.stack([own.addresses() for own in caches], axis=1))
    query, key, value = heads
    with running(pack_of(LENGTHS), Kernels(decoding_head_size=query.shape[2])):
        return attend_newest(query, key, value, caches, table_Cn4, scale=scale, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(2, 2), (6, 2), (4, 1), (16, 2), (17, 1)])
@pytest.mark.parametrize("size", [24, 32, 64, 96, 128])
def test_kernel_equals_attention_answer_by_answer(
    size: int, num_heads: int, num_key_heads: int, options: dict[str, Any]
) -> None:
    heads, caches = heads_of(num_heads, num_key_heads, size), caches_of(num_key_heads, size)
    parts = [part.double().split(1, dim=1) for part in heads]
    scale, outputs, kept = size**-0.5, [], []
    for (q, k, v), own, length in zip(zip(*parts, strict=True), caches, LENGTHS, strict=True):
        keys, values = (buffer.clone().double() for buffer in buffers_of(own))
        keys[:, length], values[:, length] = k[:, 0], v[:, 0]
        kept.append((keys, values))
        outputs.append(attend_last(q, keys[:, : length + 1], values[:, : length + 1], scale=scale, **options))

    found = decoded(heads, caches, scale, **options)

    expected = torch.cat(outputs, dim=1).transpose(0, 1).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    for own, wanted in zip(caches, kept, strict=True):  # each buffer has the new row, and no other change
        assert all(torch.equal(part, other.float()) for part, other in zip(buffers_of(own), wanted, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answer_has_the_same_bits_alone(options: dict[str, Any]) -> None:
    heads = heads_of(6, 2, 32)
    together = decoded(heads, caches_of(2, 32), **options)

    for n, length in enumerate(LENGTHS):
        (alone,) = decoded([part[:, n : n + 1] for part in heads], caches_of(2, 32, [length]), **options)
        assert torch.equal(alone, together[n])


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # NumPy computes in the interpreter
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_answer_of_nan_or_infinity_changes_no_bit_of_others(number: float) -> None:
    heads, healthy = heads_of(6, 2, 32), caches_of(2, 32)
    expected = decoded(heads, healthy, **OPTIONS["capped"])
    ruined = caches_of(2, 32)
    for buffer in buffers_of(ruined[2]):
        buffer.fill_(number)
    for part in heads:
        part[:, 2] = number

    found = decoded(heads, ruined, **OPTIONS["capped"])

    assert not found[2].isfinite().any()
    for n in (0, 1, 3, 4):
        assert torch.equal(found[n], expected[n])
        assert all(map(torch.equal, buffers_of(ruined[n]), buffers_of(healthy[n])))


def test_heads_in_another_order_of_memory_give_the_same_bits() -> None:
    by_token = heads_of(6, 2, 32)
    by_head = [part.contiguous() for part in by_token]
    in_one_matrix = [torch.cat([part, part], dim=2)[..., :32] for part in by_token]

    expected = decoded(by_token, caches_of(2, 32), **OPTIONS["causal"])

    for heads in (by_head, in_one_matrix):
        assert torch.equal(decoded(heads, caches_of(2, 32), **OPTIONS["causal"]), expected)


def test_a_pass_has_one_launch_of_one_variant_for_any_number_of_answers_and_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = recorded(monkeypatch)

    for lengths, num_heads in ((LENGTHS, 6), (LENGTHS[:1], 6), (LENGTHS[:3], 2), (LENGTHS, 40)):
        heads = [part[:, : len(lengths)] for part in heads_of(num_heads, 2, 24)]
        decoded(heads, caches_of(2, 24, lengths), **OPTIONS["window"])

    assert len(launches) == 4
    assert len({(launch.variant, frozenset(launch.properties.items())) for launch in launches}) == 1


def test_engine_that_decodes_with_the_kernel_gives_the_same_answers(
    load: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.engine.engine.measure_invariance", lambda base, lanes: "allclose")
    prompts = Prompts(prompts=((3, 14, 15, 92, 65), (7,), tuple(range(40, 75))), max_tokens=6)
    answers, launches = [], recorded(monkeypatch)
    for size in (None, 16):
        base = load("llama")
        assert base.model.config.head_dim == 16
        base.attachment = Attachment(base.model, Kernels(decoding_head_size=size))
        engine = Engine(base, EngineConfig(token_budget=4096))
        for name in ("plain", "wide"):
            admit(engine, name, submissions("llama")[name])
        generation = engine.generation(dict.fromkeys(("plain", "wide"), prompts))
        while not generation.is_complete:
            generation.advance()
        answers.append(generation.answers())
        base.attachment.detach()
        base.attachment = None

    assert answers[0] == answers[1]
    assert len(launches) == 5 * base.model.config.num_hidden_layers, "of each pass that adds a token to an answer"
