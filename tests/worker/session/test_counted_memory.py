# pyright: basic
"""Memory estimates of the service for a job, compared with the bytes that the engine takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from catalog.resources import memory
from catalog.resources.memory import BaseModelMemory, JobMemory
from lora_core.adapter.initialization import decomposed
from lora_core.base_model.model import BaseModel, describe_base, load_base
from lora_core.config import JobConfig, LoraConfig, OptimizerConfig, ScheduleConfig
from lora_core.engine import step as passes_module
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.forward.generation import Prompts
from lora_core.layers.attention import tiled_cpu
from lora_core.losses.preference import SliceScores
from lora_core.packing.packed_batch import PackedBatch
from tests.catalog.world import linears
from tests.lora_core.scenarios import dataset
from tests.tiny_models import HEADS, save

SAMPLES = {"prompts": ["a" * 60] * 8, "max_tokens": 4}


@pytest.fixture(params=["bfloat16", "float32"])
def base(base_dir: Path, request: pytest.FixtureRequest) -> BaseModel:
    return load_base(base_dir, dtype=request.param, device="cpu")


def measured_peak(run: Callable[[], object]) -> int:
    """Return the peak of the bytes that torch holds for `run`, without those that it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    profiler: Any = profiled.profiler
    events: list[Any] = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def training(
    base: BaseModel, *, lengths: list[int], init: str = "default", keep: Literal["last", "best"] = "last"
) -> Engine:
    config = JobConfig(
        lora=LoraConfig(rank=8, alpha=8, init_lora_weights=init),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(kind="constant", num_steps=2),
        batch_size=len(lengths),
        num_steps=2,
        seed=0,
        evaluate_every_steps=2,
        slice_tokens=memory.SLICE_TOKENS["cpu"],
        keep=keep,
    )
    data = dataset(1, lengths)
    engine = Engine(base, EngineConfig(token_budget=memory.JOB_TOKENS, job_tokens=memory.JOB_TOKENS))
    engine.admit("job", config, data, data if keep == "best" else None)
    return engine


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize(("lengths", "num_spare"), [([200] * 2, 0), ([200] * 6, 1)], ids=["one slice", "three slices"])
def test_the_estimate_of_a_job_equals_its_peak(
    base: BaseModel,
    init: str,
    keep: Literal["last", "best"],
    lengths: list[int],
    num_spare: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With slices of 400 tokens one counted gradient is not used: of shorter slices, a tick would hold three."""
    engine = training(base, lengths=lengths, init=init, keep=keep)
    held = spy_on_rows(engine, monkeypatch)
    while engine.progress("job")[0] < 1:
        engine.tick()

    facts = JobMemory(
        num_parameters=engine.job("job").adapter.num_parameters,
        keeps_best=keep == "best",
        init_lora_weights=init,
        batch_size=len(lengths),
        longest_example=max(lengths),
    )
    parts = facts.parts(BaseModelMemory({}, str(base.dtype).removeprefix("torch.")))
    assert sum(parts.values()) == max(held) + num_spare * 4 * engine.job("job").adapter.num_parameters


def spy_on_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the adapter bytes at each pass, when the gradients of all its slices exist."""
    held: list[int] = []
    original = passes_module.run_training

    def spied(base: BaseModel, session: PackedBatch) -> list[SliceScores]:
        held.append(engine.memory()["adapter_bytes"])
        return original(base, session)

    monkeypatch.setattr(passes_module, "run_training", spied)
    return held


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("shape", [(256, 256), (1024, 256), (256, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_initialization_of_an_adapter_stays_within_its_estimate(
    init: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight_OD = torch.randn(shape).to(dtype)
    lora = LoraConfig(rank=16, alpha=16, init_lora_weights=init)

    measured = measured_peak(lambda: decomposed(lora, "w", weight_OD, seed=0))

    description = linears(w=(list(shape), 1))
    counted = BaseModelMemory(description, str(dtype).removeprefix("torch.")).decomposition_bytes()
    assert measured <= 1.1 * counted  # small weights have a larger constant part
    assert init == "pissa_niter_4" or measured > counted / 2


def test_the_generation_of_answers_stays_within_its_estimate(base: BaseModel, base_dir: Path) -> None:
    engine = training(base, lengths=[20])
    prompts = Prompts(prompts=tuple(tuple(range(3, 63)) for _ in range(8)), max_tokens=4)
    generation = engine.generation({"job": prompts})

    measured = measured_peak(generation.advance)

    description, precision = describe_base(base_dir), str(base.dtype).removeprefix("torch.")
    answers = BaseModelMemory(description, precision).samples_bytes(SAMPLES)
    logits = BaseModelMemory(description, precision).tick_bytes(0)
    assert measured <= answers + logits
    assert measured > answers / 4


@pytest.fixture(scope="module")
def capped_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Gemma 2 base: one of its two layers has a sliding window, and all scores are capped."""
    options = HEADS | {"sliding_window": 64, "query_pre_attn_scalar": 16, "max_position_embeddings": 2112}
    return save("gemma2", tmp_path_factory.mktemp("capped") / "base", **options)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_memory_of_capped_scores_grows_linearly_with_the_length(
    capped_dir: Path, precision: Literal["bfloat16", "float32"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and activations of this family, as torch operations, keep about twice as much as is counted. With stored
    scores it would be 40 times as much."""
    monkeypatch.setitem(tiled_cpu.STRIP_NUMBERS, "cpu", 1 << 17)  # a size that suits this base
    base = load_base(capped_dir, dtype=precision, device="cpu")
    training(base, lengths=[30]).tick()  # fills the permanent caches

    peaks = [measured_peak(training(base, lengths=[length]).tick) for length in (1056, 2112)]

    description = describe_base(capped_dir)
    counted = [BaseModelMemory(description, precision).tick_bytes(length) for length in (1056, 2112)]
    assert peaks[1] - peaks[0] < 2.2 * (counted[1] - counted[0])
