"""An answer does not depend on the prompts that join and leave while it grows, nor on restarts."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.errors import ConfigError, OutOfMemory
from lora_core.forward import continuous_batch
from lora_core.forward.continuous_batch import ContinuousBatch, NewToken, Prompt
from lora_core.forward.sampling import Sampling
from lora_core.kernels import kv_cache
from lora_core.runtime import cpu_lanes
from lora_core.runtime.cpu_lanes import Lanes
from tests.lora_core.forward.test_generation import PROMPTS, greedy, spy_on_passes
from tests.lora_core.scenarios import admit, submissions

NAMES = ("plain", "dropout", "dora", "head", "tokens", "tiny")


@pytest.fixture(scope="module")
def engine(base_dirs) -> Engine:
    """An engine with trained adapters of every kind of output head."""
    base = load_base(base_dirs["llama"], dtype="float32", device="cpu")
    made = Engine(base, EngineConfig(token_budget=4096))
    for name in NAMES:
        admit(made, name, submissions("llama")[name])
    while not made.idle:
        made.tick()
    return made


def batch_on(engine: Engine, *, cache_tokens: int = 4096, prompt_tokens: int = 4096) -> ContinuousBatch:
    return ContinuousBatch(engine.base, lanes=Lanes(1), cache_tokens=cache_tokens, prompt_tokens=prompt_tokens)


def prompts_of(engine: Engine) -> list[Prompt]:
    """Twelve prompts: two lengths for each adapter, greedy and sampled, some with alternatives."""
    return [
        Prompt(
            name=f"{number}",
            adapter=engine.adapter(NAMES[number % len(NAMES)]),
            ids=tuple(range(3 + number, 8 + 5 * number)),
            max_tokens=4 + number,
            sampling=Sampling(
                temperature=0.8 * (number % 3),
                top_p=1.0 if number % 2 else 0.9,
                seed=number,
                frequency_penalty=0.5 * (number % 2),
                num_alternatives=2 if number % 4 == 0 else None,
            ),
        )
        for number in range(12)
    ]


def drained(batch: ContinuousBatch, found: dict[str, list[NewToken]] | None = None) -> dict[str, list[NewToken]]:
    found = {} if found is None else found
    while len(batch):
        for new in batch.advance():
            found.setdefault(new.name, []).append(new)
    return found


def ids_of(answer: list[NewToken]) -> tuple[int, ...]:
    return tuple(new.chosen.token for new in answer if new.chosen is not None)


def alone(engine: Engine, prompt: Prompt) -> list[NewToken]:
    batch = batch_on(engine)
    batch.add(prompt)
    return drained(batch)[prompt.name]


@pytest.fixture(scope="module")
def expected(engine) -> dict[str, list[NewToken]]:
    """Each prompt's answer without other prompts."""
    return {prompt.name: alone(engine, prompt) for prompt in prompts_of(engine)}


def test_prompts_that_join_between_passes_get_the_answers_that_they_get_alone(engine, expected):
    batch, found = batch_on(engine), {}
    for prompt in prompts_of(engine):
        batch.add(prompt)
        for new in batch.advance():
            found.setdefault(new.name, []).append(new)

    assert drained(batch, found) == expected
    assert all(answer[-1].finish == "length" for answer in expected.values())
    assert len({ids_of(answer[:3]) for answer in expected.values()}) > 6


def test_answers_do_not_depend_on_the_number_of_lanes(engine, expected, monkeypatch):
    monkeypatch.setattr(cpu_lanes, "MIN_LANE_TOKENS", 3)
    batch = ContinuousBatch(engine.base, lanes=Lanes(3), cache_tokens=4096, prompt_tokens=4096)
    for prompt in prompts_of(engine):
        batch.add(prompt)

    assert drained(batch) == expected


def test_prompt_that_leaves_changes_no_other_answer(engine, expected):
    batch, found = batch_on(engine), {}
    for prompt in prompts_of(engine):
        batch.add(prompt)
    for gone in ("3", "4", "11", "unknown"):
        for new in batch.advance():
            found.setdefault(new.name, []).append(new)
        batch.remove(gone)

    drained(batch, found)

    assert {name: answer for name, answer in found.items() if name not in ("3", "4", "11")} == {
        name: answer for name, answer in expected.items() if name not in ("3", "4", "11")
    }
    assert len(found["3"]) == 1


@pytest.mark.parametrize(("cache_tokens", "prompt_tokens"), [(1, 1), (60, 4096), (120, 20), (4096, 1)])
def test_answers_do_not_depend_on_the_size_of_the_cache(engine, expected, monkeypatch, cache_tokens, prompt_tokens):
    for module in (kv_cache, continuous_batch):
        monkeypatch.setattr(module, "GROWTH_TOKENS", 4)
    passes = spy_on_passes(monkeypatch)
    batch = batch_on(engine, cache_tokens=cache_tokens, prompt_tokens=prompt_tokens)
    for prompt in prompts_of(engine):
        batch.add(prompt)

    assert drained(batch) == expected
    assert len(passes) > 15, "not all prompts were in the first pass"


def test_answer_that_restarts_reports_each_token_once(engine, expected, monkeypatch):
    for module in (kv_cache, continuous_batch):
        monkeypatch.setattr(module, "GROWTH_TOKENS", 4)
    passes = spy_on_passes(monkeypatch)
    first, second = prompts_of(engine)[10:]
    batch = batch_on(engine, cache_tokens=len(first.ids) + len(second.ids) + 10)
    batch.add(first)
    batch.add(second)

    found = drained(batch)

    assert found == {first.name: expected[first.name], second.name: expected[second.name]}
    num_prompt_passes = sum(length == len(second.ids) for lengths in passes for length in lengths)
    assert num_prompt_passes == 2, "the newer answer restarted once"


def test_base_model_answers_without_an_adapter_as_in_transformers(engine, base_dirs):
    reference = AutoModelForCausalLM.from_pretrained(base_dirs["llama"])
    batch = batch_on(engine)
    for number, ids in enumerate(PROMPTS.prompts):
        prompt = Prompt(name=str(number), adapter=engine.no_adapter(), ids=ids, max_tokens=PROMPTS.max_tokens)
        batch.add(prompt)

    found = drained(batch)

    assert [ids_of(found[name]) for name in "012"] == greedy(reference, PROMPTS)


def test_end_token_completes_an_answer_and_belongs_to_it(engine, expected):
    prompt = prompts_of(engine)[0]
    third = ids_of(expected["0"])[2]
    ended = Prompt(
        name="0",
        adapter=prompt.adapter,
        ids=prompt.ids,
        max_tokens=50,
        end_ids=frozenset({third}),
        sampling=prompt.sampling,
    )

    found = alone(engine, ended)

    assert found[-1].finish == "stop"
    assert ids_of(found)[-1] == third
    assert [new.chosen for new in found] == [new.chosen for new in expected["0"]][: len(found)]


def test_logits_that_are_not_finite_complete_only_their_own_answer(engine, expected, load):
    bad = Engine(load("llama"), EngineConfig())  # another base model: this adapter must not touch the shared one
    admit(bad, "plain", submissions("llama")["plain"])
    ruined = bad.adapter("plain")
    ruined.p.fill_(float("nan"))
    ruined.refresh_compute()
    healthy = prompts_of(engine)[1]
    batch = batch_on(bad)
    batch.add(Prompt(name="bad", adapter=ruined, ids=(1, 2, 3), max_tokens=4))
    batch.add(Prompt(name="good", adapter=bad.no_adapter(), ids=healthy.ids, max_tokens=4))

    found = drained(batch)

    assert found["bad"] == [NewToken(name="bad", chosen=None, finish="not_finite")]
    assert [new.finish for new in found["good"]] == [None, None, None, "length"]


def test_out_of_memory_for_one_prompt_removes_it_and_the_others_continue(engine, expected, monkeypatch):
    original = continuous_batch.hidden_states

    def starved(base, pack):
        if max(pack.sequence_lengths) > 44:
            raise torch.OutOfMemoryError("no memory")
        return original(base, pack)

    monkeypatch.setattr(continuous_batch, "hidden_states", starved)
    batch, failed, found = batch_on(engine), [], {}
    for prompt in prompts_of(engine):
        batch.add(prompt)
    while len(batch):
        try:
            for new in batch.advance():
                found.setdefault(new.name, []).append(new)
        except OutOfMemory as error:
            failed.append(error.job)

    assert failed == ["10", "11"]
    assert found == {name: answer for name, answer in expected.items() if name not in failed}
    assert batch._cache_tokens == 4096, "the limit that the failed prompts caused is gone"


def test_cache_grows_again_after_a_shortage(engine, expected, monkeypatch):
    monkeypatch.setattr(continuous_batch, "RECOVERY_PASSES", 4)
    original, limits = continuous_batch.hidden_states, []

    def starved(base, pack):
        limits.append(batch._cache_tokens)
        if len(limits) == 1:
            raise torch.OutOfMemoryError("no memory")
        return original(base, pack)

    monkeypatch.setattr(continuous_batch, "hidden_states", starved)
    batch = batch_on(engine, cache_tokens=4096)
    for prompt in prompts_of(engine):
        batch.add(prompt)

    assert drained(batch) == expected
    halved = limits[1]
    assert halved < 1024
    assert limits[2:7] == [halved + 1024, halved + 2048, halved + 3072, 4096, 4096]


def test_long_prompt_does_not_wait_until_other_answers_are_complete(engine, expected):
    short, long = prompts_of(engine)[0], max(prompts_of(engine), key=lambda prompt: len(prompt.ids))
    batch, found = batch_on(engine, prompt_tokens=len(long.ids) - 1), {}
    for prompt in (short, long):
        batch.add(prompt)
        for new in batch.advance():
            found.setdefault(new.name, []).append(new)

    assert len(found[long.name]) == 1
    drained(batch, found)
    assert found == {prompt.name: expected[prompt.name] for prompt in (short, long)}


def test_cache_grows_in_steps_and_up_to_the_longest_possible_answer(engine, monkeypatch):
    monkeypatch.setattr(kv_cache, "GROWTH_TOKENS", 16)
    kept = kv_cache.SequenceCache(max_tokens=40)
    keys, values = torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    sizes = []
    for token in range(40):
        kept.begin_pass()
        found = kept.extended(keys[:, token : token + 1], values[:, token : token + 1])
        kept.num_tokens += 1
        torch.testing.assert_close(found, (keys[:, : token + 1], values[:, : token + 1]), rtol=0, atol=0)
        sizes.append(found[0].untyped_storage().nbytes() // (2 * 8 * 4))

    assert sorted(set(sizes)) == [16, 32, 40]


def test_addresses_are_those_of_buffers_with_space_for_one_more_token(monkeypatch):
    monkeypatch.setattr(kv_cache, "GROWTH_TOKENS", 16)
    kept = kv_cache.SequenceCache(max_tokens=40)
    new = [(torch.randn(2, 1, 8), torch.randn(2, 1, 12)) for _ in range(3)]  # one for each attention call
    for token in range(40):
        addresses = kept.addresses()
        kept.begin_pass()
        buffers = [kept.extended(*pair) for pair in new]
        kept.num_tokens += 1
        if token:
            expected = [(keys.data_ptr(), values.data_ptr()) for keys, values in buffers]
            assert [tuple(row) for row in addresses[:, :2]] == expected, "the pass wrote to these buffers"
            assert addresses[:, 2].tolist() == [keys.stride(0) // 8 for keys, _ in buffers]
            assert addresses[:, 3].tolist() == [token] * 3
        assert all((keys == pair[0]).all() for (keys, _), pair in zip(buffers, new, strict=True)), "kept as it grew"


def test_engine_limits_the_bytes_of_the_cache(engine):
    layers = engine.base.model.config.num_hidden_layers
    heads, size = engine.base.model.config.num_key_value_heads, engine.base.model.config.head_dim
    batch = engine.continuous_batch(cache_bytes=30 * 2 * 4 * layers * heads * size)

    for prompt in prompts_of(engine)[:3]:
        batch.add(prompt)
    batch.advance()

    assert batch.cache_bytes_per_token == 2 * 4 * layers * heads * size
    assert [answer.prompt for answer in batch._growing] == prompts_of(engine)[:2], "no more fits"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_exported_adapter_answers_as_its_job_does(engine, tmp_path, name):
    engine.export(name, tmp_path / "adapter", base_name="base")
    prompt = Prompt(name="one", adapter=engine.adapter(name), ids=(5, 6, 7, 8), max_tokens=12)

    loaded = replace(prompt, adapter=engine.load_adapter(tmp_path / "adapter"))

    assert alone(engine, loaded) == alone(engine, prompt)


def test_prompt_that_can_not_be_answered_is_rejected(engine):
    batch = batch_on(engine)

    with pytest.raises(ConfigError, match="The prompt is empty"):
        batch.add(Prompt(name="empty", adapter=engine.no_adapter(), ids=(), max_tokens=1))
    with pytest.raises(ConfigError, match="The prompt has 200 tokens"):
        batch.add(Prompt(name="long", adapter=engine.no_adapter(), ids=(1,) * 200, max_tokens=57))
    assert len(batch) == 0


def test_only_a_sharded_base_model_limits_a_prompt_with_its_answer(engine, monkeypatch):
    batches = [batch_on(engine, cache_tokens=30, prompt_tokens=50), batch_on(engine, cache_tokens=70, prompt_tokens=50)]
    assert [batch.max_sequence_tokens for batch in batches] == [None, None]

    monkeypatch.setattr(engine.base, "strategy", "fsdp2")

    assert [batch.max_sequence_tokens for batch in batches] == [30, 50], "the cache, or one pass"


def test_prompts_with_low_priority_wait_for_all_others(engine, expected):
    prompts = prompts_of(engine)
    batch, order = batch_on(engine, prompt_tokens=1), []
    for prompt in prompts[:4]:
        batch.add(replace(prompt, has_low_priority=True))
    for prompt in prompts[4:8]:
        batch.add(prompt)
    found = {}
    while len(batch):
        for new in batch.advance():
            if new.name not in found:
                order.append(new.name)
            found.setdefault(new.name, []).append(new)

    assert order == ["4", "5", "6", "7", "0", "1", "2", "3"]
    assert found == {prompt.name: expected[prompt.name] for prompt in prompts[:8]}


def test_answers_with_low_priority_give_their_cache_to_others_and_restart(engine, expected):
    low, urgent = prompts_of(engine)[:3], prompts_of(engine)[9]
    cache_tokens = sum(len(prompt.ids) + prompt.max_tokens for prompt in low)
    batch, found = batch_on(engine, cache_tokens=cache_tokens), {}
    for prompt in low:
        batch.add(replace(prompt, has_low_priority=True))
    for new in batch.advance():
        found.setdefault(new.name, []).append(new)
    assert found.keys() == {"0", "1", "2"}
    batch.add(urgent)

    (first,) = batch.advance()

    assert first.name == urgent.name
    found[first.name] = [first]
    assert drained(batch, found) == {prompt.name: expected[prompt.name] for prompt in (*low, urgent)}
