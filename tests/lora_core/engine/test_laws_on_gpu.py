"""The laws of the engine on a CUDA GPU, within the tolerance of the probe: only `pytest -m gpu` runs these tests.

The GPU kit runs them on machines that lack the packages of the service, so nothing here imports these.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_core.base_model.model import BaseModel, load_base
from lora_core.engine.engine import Engine
from lora_core.engine.invariance_probe import CLOSE
from lora_core.engine_config import EngineConfig
from lora_core.events import JobStepped
from lora_core.forward.generation import Prompts
from lora_core.kernels.selection import AttentionHeads, choose_kernels
from lora_core.peft_format.verify import verify_export
from tests.lora_core.scenarios import Submission, admit, submissions, weights

pytestmark = pytest.mark.gpu
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
QUESTION = Prompts(prompts=((3, 4, 5, 6, 7), (9, 10)), max_tokens=5)
Weights = dict[str, torch.Tensor]


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("a CUDA GPU is missing")
    return "cuda:0"


@pytest.fixture
def load_on(base_dirs: dict[str, Path], device: str) -> Callable[[str], BaseModel]:
    return lambda family: load_base(base_dirs[family], dtype="bfloat16", device=device)


@pytest.fixture(scope="module")
def packed() -> dict[str, Weights]:
    """Weights of all jobs after they trained in one pack, by family, computed once for all tests."""
    return {}


def expected(packed: dict[str, Weights], base: BaseModel, family: str) -> Weights:
    if family not in packed:
        packed[family] = train(base, submissions(family))
    return packed[family]


def train(base: BaseModel, jobs: dict[str, Submission], *, moved: Path | None = None, victim: str = "") -> Weights:
    """Return each job's weights after training. `victim` leaves after a step, and with `moved` the others resume."""
    engine = Engine(base, EngineConfig(token_budget=512))
    for name, job in jobs.items():
        admit(engine, name, job)
    while not engine.idle:
        for event in engine.tick():
            if not isinstance(event, JobStepped) or event.step != 1:
                continue
            if event.job == victim:
                engine.evict(victim)
            elif moved is not None:
                engine.save_checkpoint(event.job, moved / event.job)
                engine.evict(event.job)
                admit(engine, event.job, jobs[event.job], resume_from=moved / event.job)
    return {job: weights(engine, job).cpu().clone() for job in engine.jobs()}


def assert_close(found: Weights, expected: Weights) -> None:
    differences = {
        name: float((weights - expected[name]).norm() / expected[name].norm()) for name, weights in found.items()
    }
    assert {name: each for name, each in differences.items() if not each < CLOSE} == {}


@pytest.mark.parametrize(("size", "is_capped"), [(64, False), (128, False), (128, True), (256, True)])
def test_every_kernel_family_agrees_with_its_reference(device: str, size: int, is_capped: bool) -> None:
    chosen = choose_kernels(torch.device(device), torch.bfloat16, AttentionHeads(size=size, is_capped=is_capped))

    assert chosen.reasons == ()
    assert (chosen.lora, chosen.elementwise, chosen.decoding_head_size) == ("tiled", "compiled", size)


@FAMILIES
def test_packed_equals_solo(load_on: Callable[[str], BaseModel], packed: dict[str, Weights], family: str) -> None:
    base = load_on(family)

    alone = {name: train(base, {name: job})[name] for name, job in submissions(family).items()}

    assert_close(alone, expected(packed, base, family))


@FAMILIES
def test_second_run_gives_the_same_bits(
    load_on: Callable[[str], BaseModel], packed: dict[str, Weights], family: str
) -> None:
    base = load_on(family)
    first = expected(packed, base, family)

    second = train(base, submissions(family))

    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@FAMILIES
def test_resumed_equals_uninterrupted(
    load_on: Callable[[str], BaseModel], packed: dict[str, Weights], family: str, tmp_path: Path
) -> None:
    base = load_on(family)

    assert_close(train(base, submissions(family), moved=tmp_path), expected(packed, base, family))


@FAMILIES
def test_departure_of_a_job_changes_no_other(
    load_on: Callable[[str], BaseModel], packed: dict[str, Weights], family: str
) -> None:
    base = load_on(family)

    found = train(base, submissions(family), victim="plain")

    assert "plain" not in found
    assert_close(found, expected(packed, base, family))


@FAMILIES
def test_weights_of_nan_reach_no_other_job(load_on: Callable[[str], BaseModel], family: str) -> None:
    base, jobs = load_on(family), {name: submissions(family)[name] for name in ("plain", "wide")}
    alone = train(base, {"wide": jobs["wide"]})
    engine = Engine(base, EngineConfig())
    for name, job in jobs.items():
        admit(engine, name, job)
    weights(engine, "plain").fill_(torch.nan)

    while not engine.idle:
        engine.tick()

    assert_close({"wide": weights(engine, "wide").cpu()}, alone)


@FAMILIES
def test_exports_are_verified_by_peft_and_answers_do_not_depend_on_packmates(
    load_on: Callable[[str], BaseModel], family: str, tmp_path: Path
) -> None:
    base, jobs = load_on(family), submissions(family)
    engine = Engine(base, EngineConfig())
    for name, job in jobs.items():
        admit(engine, name, job)
    while not engine.idle:
        engine.tick()

    together = answers(engine, *jobs)

    for name in jobs:
        engine.export(name, tmp_path / name, base_name="tiny")
        assert verify_export(base, tmp_path / name).passed, name
        assert answers(engine, name) == {name: together[name]}


def answers(engine: Engine, *jobs: str) -> dict[str, list[tuple[int, ...]]]:
    generation = engine.generation(dict.fromkeys(jobs, QUESTION))
    while not generation.is_complete:
        generation.advance()
    return generation.answers()
