"""Jobs on a base model that FSDP2 or ZeRO-3 shards over two fake CUDA devices. This process is rank 0.

Torch's fake process group answers at once: a gathered tensor has copies of the own one, and nothing is received. Like
the real group, it has one backend for each kind of device.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _world
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, PreTrainedModel

from lora_core.base_model.blocks import find_blocks
from lora_core.base_model.patching import Attachment
from lora_core.base_model.sharding import Strategy, allocated_bytes, shard
from lora_core.distributed.ranks import Ranks, connect_all
from lora_core.engine.engine import Engine
from lora_core.forward.generation import Prompts
from tests.lora_core.fake_cuda.runs import DEVICE, base_on_device, engine_config, fake_device
from tests.lora_core.scenarios import admit
from tests.lora_core.train_in_ranks import jobs_called
from tests.tiny_models import COMMON

NUM_RANKS = 2
BACKENDS = "cpu:fake,cuda:fake"


def run_sharded_jobs(*, strategy: Strategy) -> dict[str, Any]:
    """Run jobs to their end, answer prompts, and compute the untouched model as for PEFT.

    Returns the steps of each job, the distinct messages, the backends of each process group, the number of groups that
    send, and where the shards are.
    """
    jobs = jobs_called("kinds", is_sharded=True)
    with fake_device() as observer, _two_ranks(), _cuda_for(strategy):
        ranks = _Leader(rank=0, size=NUM_RANKS)
        base = base_on_device(AutoConfig.for_model("llama", **COMMON), {})
        assert base.attachment is not None
        base.attachment.detach()
        with observer.counting() as counts:
            connect_all(ranks, DEVICE)
            shard(base.model, strategy, ranks, device=DEVICE, dtype=base.dtype)
            base.strategy = strategy
            base.attachment = Attachment(base.model, base.attachment.kernels, is_sharded=True)
            engine = Engine(base, engine_config(token_budget=512, checkpoint_blocks="never"), ranks)
            for name, job in jobs.items():
                admit(engine, name, job)
            while not engine.idle:
                engine.tick()
            answers = engine.generation({"plain": Prompts(prompts=((5, 6, 7),), max_tokens=4)})
            while not answers.is_complete:
                answers.advance()
            with base.untouched() as model, torch.no_grad():
                model(torch.ones(1, 16, dtype=torch.int64, device=DEVICE))
        return {
            "steps": {job: engine.progress(job)[0] for job in engine.jobs()},
            "messages": sorted(map(list, counts.messages)),
            "groups": [dist.get_backend_config(group) for group in _world.pg_map],
            "num_senders": len(counts.senders),
            "shards": _kinds_of_shards(base.model),
        }


def _kinds_of_shards(model: PreTrainedModel) -> list[str]:
    weights = [weight for block in find_blocks(model).modules for weight in block.parameters()]
    return [kind for kind in ("cpu", "cuda") if any(allocated_bytes(weight, kind) for weight in weights)]


class _Leader(Ranks):
    def shared_out(self, sizes: Sequence[int], *, short: Collection[int] = ()) -> list[int]:
        """The other rank has at most as many slices as this one, whose scores stand for the other's."""
        num_own = -(-len(sizes) // 2)
        return [0] * num_own + [1] * (len(sizes) - num_own)


@contextmanager
def _two_ranks() -> Iterator[None]:
    patches: dict[str, Any] = {
        "torch.distributed.device_mesh.init_device_mesh": _mesh_of_numbers,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.stream": lambda stream: stream,
        "torch.cuda.current_stream": lambda *_: _Stream(),
        "torch.accelerator.current_stream": lambda *_: _Stream(),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda _: (9, 0),
        "torch.cuda.Event": _Event,
    }
    with _patched(patches):
        dist.init_process_group(BACKENDS, rank=0, world_size=NUM_RANKS, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _cuda_for(strategy: Strategy) -> Iterator[None]:
    """Replace the functions of CUDA that DeepSpeed alone calls, and let it connect to the process group of this run."""
    if not strategy.startswith("zero3"):
        yield
        return
    from deepspeed.runtime.zero.utils import (  # pyright: ignore[reportMissingImports]
        assert_ints_same_as_other_ranks,
    )

    coordinator = "deepspeed.runtime.zero.partitioned_param_coordinator"
    patches: dict[str, Any] = {
        "torch.cuda.set_device": lambda _: None,
        "torch.cuda.synchronize": lambda _: None,
        "torch.cuda.nvtx.range_push": lambda _: None,
        "torch.cuda.nvtx.range_pop": lambda: None,
        "torch.Tensor.record_stream": lambda *_: None,
        # It sends integers and their number, and compares both with what it reads back. The fake device returns 1.
        f"{coordinator}.assert_ints_same_as_other_ranks": lambda _: assert_ints_same_as_other_ranks([1]),
        "deepspeed.comm.comm.cdb": None,
        "deepspeed.utils.groups._WORLD_GROUP": None,
    }
    with patch.dict(os.environ, LOCAL_RANK="0"), _patched(patches):
        yield


@contextmanager
def _patched(patches: Mapping[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(patch(name, stand_in))
        yield


def _mesh_of_numbers(*args: Any) -> DeviceMesh:
    """Create a mesh, whose ranks are read on the host."""
    with _disable_current_modes():
        return DeviceMesh(args[0], list(range(args[1][0])))


class _Event:
    """An event that has happened."""

    def __init__(self, **_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, _: Any) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    """A stream whose work is complete."""

    def __init__(self, **_: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self) -> _Event:
        return _Event()
