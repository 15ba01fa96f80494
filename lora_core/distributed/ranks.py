# pyright: basic
"""The processes of one trainer, and all that they say to each other. Only this and sharding.py know torch.distributed.

Every process (rank) has the same jobs in the same state and makes the same decisions; the passes of a tick alone are
shared out, slice by slice. What a step adds up is added in the order of its slices, whoever has computed them: so where
kernels give the same bits everywhere, an adapter doesn't tell how many have trained it. Messages are JSON, no pickle.
"""

import json
import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

from lora_core.errors import LoraCoreError

T = TypeVar("T")
CARRIED_NUMBERS = 1 << 20
"""Of a sum that goes from rank to rank: while one piece is added to, the next is on its way."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Messages are in the host's memory on either."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Of one trainer: this process's number among `size`. Each method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    is_apart: bool = False
    """They are on several machines: some have not the leader's disk."""
    is_first_elsewhere: bool = False
    """The first on such a machine."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that decides, and that speaks to the outside."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The leader's `value`, JSON-able, on every rank; that of the others is not looked at."""
        if self.size == 1:
            return value
        content = _encoded(value) if self.leads else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(content)])
        dist.broadcast(length, src=0)
        if not self.leads:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return value if self.leads else _decoded(content)

    def broadcast_bytes(self, content: bytearray) -> None:
        """The leader's content, on every rank; of the others what is written over, of the same length."""
        dist.broadcast(torch.frombuffer(content, dtype=torch.uint8), src=0)

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's `value`, JSON-able, in the order of ranks."""
        if self.size == 1:
            return [value]
        content = _encoded(value)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]))
        longest = max(map(int, lengths))
        padded = torch.cat([content, torch.zeros(longest - len(content), dtype=torch.uint8)])
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [_decoded(part[: int(length)]) for part, length in zip(found, lengths, strict=True)]

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """Everybody's whole numbers, as many of each; in the order of ranks. Cheaper than `gathered`."""
        if self.size == 1:
            return [list(own)]
        found = [torch.empty(len(own), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(own, dtype=torch.int64))
        return [part.tolist() for part in found]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised within on one rank is raised on all of them, so that all have done the same."""
        if self.size == 1:
            yield
            return
        problem: LoraCoreError | OSError | None = None
        try:
            yield
        except (LoraCoreError, OSError) as error:
            problem = error
        found = {rank: told for rank, told in enumerate(self.gathered(_problem_fields(problem))) if told is not None}
        if problem is None and found:
            problem = LoraCoreError(**next(iter(found.values())))  # which one it was tells its code
        if isinstance(problem, LoraCoreError):
            problem.ranks = tuple(found)
        if problem is not None:
            raise problem

    def by_leader(self, act: Callable[[], T]) -> T | None:
        """What `act` returns, which the leader alone does; what it raises is raised on every rank."""
        with self.together():
            return act() if self.leads else None

    def shared_out(self, sizes: Sequence[int], *, short: Collection[int] = ()) -> list[int]:
        """The rank that computes each of `sizes` (tokens of slices, in their order): about as many for each rank, and
        no rank's slices before those of a lower one. short: not all; on these one alone didn't fit, for what else is on
        a device differs from rank to rank: a single slice goes to another."""
        if self.size == 1:
            return [0] * len(sizes)
        if len(sizes) == 1 and short:
            return [min(set(range(self.size)).difference(short))]
        ranks: list[int] = []
        total, before = sum(sizes), 0
        for size in sizes:
            ranks.append(min(self.size - 1, (2 * before + size) * self.size // (2 * total)))
            before += size
        return ranks

    def carry(self, total: Tensor, *, holder: int | None, parts: Sequence[tuple[int, Tensor | None]]) -> int | None:
        """Add to `total`, a flat vector whose value `holder` has (None: nobody has begun), each part in its order.

        parts: the rank that has it, and there the vector, or None where it lies in `total` already. Returns the rank
        that has the sum now; elsewhere `total` is of no use, until `spread`.
        """
        runs = [(rank, [part for _, part in run]) for rank, run in groupby(parts, key=lambda part: part[0])]
        for start in range(0, total.numel() if runs else 0, CARRIED_NUMBERS):
            piece, at = slice(start, start + CARRIED_NUMBERS), holder
            for rank, own in runs:
                self._hand_on(total[piece], at, rank)
                if rank == self.rank:
                    for part in own:
                        if part is not None:
                            total[piece].add_(part[piece])
                at = rank
        return runs[-1][0] if runs else holder

    def _hand_on(self, piece: Tensor, at: int | None, rank: int) -> None:
        if at is None or at == rank:
            return
        if self.rank == at:
            dist.send(piece, dst=rank)
        elif self.rank == rank:
            dist.recv(piece, src=at)

    def spread(self, total: Tensor, *, holder: int | None) -> None:
        """What `holder` has, on every rank."""
        if self.size > 1 and holder is not None:
            dist.broadcast(total, src=holder)


ALONE = Ranks()


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the processes of several machines meet, and which of them are on this one."""

    address: str
    """Of the machine that leads: nothing listens elsewhere."""
    interface: str
    """Of this machine: what ranks say to each other goes through it."""
    port: Callable[[], int]
    """Where the leader listens: of every process but the leader, and waits until it is known."""
    tell_port: Callable[[int], None]
    """Of the leader."""
    name: str
    """Those of another name are not met."""
    first_rank: int
    num_ranks: int
    """Of all machines."""
    seconds: float
    """For which a process tries to reach the store of the leader. How long it waits there for those who have not come
    is `silence_seconds`, as later."""


def join(device: str, *, silence_seconds: float, meeting: Meeting | None = None, file: Path | None = None) -> Ranks:
    """The ranks that this process was launched among, by `accelerate launch` or torchrun; ALONE where it was by itself.

    silence_seconds: after which a rank that waits for another one gives up, with an error. meeting: where those that
    were launched on one machine are some of more. file: of a new name, by which those of one machine meet, so that no
    store listens for them; None: as the launcher says. Call it once.
    """
    own_rank, num_own = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_own == 1 and meeting is None:
        return ALONE
    kind = device.partition(":")[0]
    if kind == "cuda":
        torch.cuda.set_device(device)
    given: dict[str, Any] = {}
    if meeting is not None:
        given = _met(meeting, own_rank)
    elif file is not None:
        given = {"store": _kept(file, silence_seconds), "rank": own_rank, "world_size": num_own}
    dist.init_process_group(BACKENDS[kind], timeout=timedelta(seconds=silence_seconds), **given)
    ranks = Ranks(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        is_apart=meeting is not None,
        is_first_elsewhere=meeting is not None and own_rank == 0 and meeting.first_rank > 0,
    )
    greet(ranks, device)
    return ranks


def greet(ranks: Ranks, device: str) -> None:
    """A number from every rank to every higher one, and one from the first to all.

    NCCL makes the channel between two ranks when they first speak, in the device's memory: what is free is looked at
    later, and memory has no need to run out amid training.
    """
    number = torch.zeros(1, device=device)
    for low, high in combinations(range(ranks.size), 2):
        if ranks.rank == low:
            dist.send(number, dst=high)
        elif ranks.rank == high:
            dist.recv(number, src=low)
    ranks.spread(number, holder=0)


def _kept(file: Path, silence_seconds: float) -> FileStore:
    """A store that outlives each of the ranks: what the first of them failed of can be read when it has gone."""
    store = FileStore(str(file), -1)
    store.set_timeout(timedelta(seconds=silence_seconds))
    return store


def _met(meeting: Meeting, own_rank: int) -> dict[str, Any]:
    """Torch's own rendezvous would listen at every address of the machine: here the leader's socket is handed to it."""
    rank = meeting.first_rank + own_rank
    os.environ |= {"GLOO_SOCKET_IFNAME": meeting.interface, "NCCL_SOCKET_IFNAME": f"={meeting.interface}"}
    timeout = timedelta(seconds=meeting.seconds)
    if rank == 0:
        listening = socket.create_server((meeting.address, 0), backlog=meeting.num_ranks)
        port = int(listening.getsockname()[1])
        store = TCPStore(
            meeting.address,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        meeting.tell_port(port)
    else:
        store = TCPStore(meeting.address, meeting.port(), is_master=False, timeout=timeout)
    named = PrefixStore(meeting.name, store)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(meeting.num_ranks)}  # for whoever looks there
    return {"store": named, "rank": rank, "world_size": meeting.num_ranks}


def leave() -> None:
    """Of every rank, when all is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _problem_fields(problem: LoraCoreError | OSError | None) -> dict[str, str] | None:
    if problem is None:
        return None
    if isinstance(problem, OSError):
        return {"message": f"{problem}.", "remedy": "Look at the disk of that machine.", "code": "disk_error"}
    return {"message": problem.message, "remedy": problem.remedy, "code": problem.code}


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(content: Tensor) -> Any:
    return json.loads(content.numpy().tobytes())
