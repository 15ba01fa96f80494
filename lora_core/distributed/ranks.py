# pyright: basic
"""The processes (ranks) of one trainer and their messages. Only this file and sharding.py use torch.distributed.

Every rank has the same jobs in the same state and makes the same decisions. Only the passes of a tick are distributed,
slice by slice. Gradients are added in the order of slices, whichever rank computed them. If kernels give the same bits
on all ranks, an adapter therefore doesn't depend on their number. Messages are JSON, never pickle.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

from lora_core.errors import LoraCoreError

T = TypeVar("T")
CARRIED_NUMBERS = 1 << 20
"""Elements of one piece of a sum that is passed from rank to rank. Adding to a piece overlaps with sending the next."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Messages are exchanged through host memory in both cases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process's rank among the `size` ranks of a trainer. All ranks must call each method in the same order."""

    rank: int = 0
    size: int = 1
    is_multi_node: bool = False
    """The ranks run on several machines, so some don't have access to the leader's disk."""
    is_first_elsewhere: bool = False
    """This is the first rank on a machine other than the leader's."""

    @property
    def leads(self) -> bool:
        """Whether this rank makes the decisions and communicates with the worker."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return the leader's JSON-serializable `value` on every rank. The values of other ranks are ignored."""
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
        """Overwrite `content` with the leader's on every rank. It must have the same length on all of them."""
        dist.broadcast(torch.frombuffer(content, dtype=torch.uint8), src=0)

    def gathered(self, value: Any) -> list[Any]:
        """Return the JSON-serializable `value` of every rank, in the order of ranks."""
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
        """Return the integers of every rank, in the order of ranks. All pass equally many. Cheaper than `gathered`."""
        if self.size == 1:
            return [list(own)]
        found = [torch.empty(len(own), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(own, dtype=torch.int64))
        return [part.tolist() for part in found]

    def leader_numbers(self, own: Sequence[float]) -> list[float]:
        """Return the leader's numbers, fp64, on every rank. All pass equally many."""
        if self.size == 1:
            return list(own)
        numbers = torch.tensor(own, dtype=torch.float64)
        dist.broadcast(numbers, src=0)
        return numbers.tolist()

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Raise an error of one rank on all of them, so that they stay in the same state."""
        if self.size == 1:
            yield
            return
        problem: LoraCoreError | OSError | None = None
        try:
            yield
        except (LoraCoreError, OSError) as error:
            problem = error
        found = {
            rank: fields for rank, fields in enumerate(self.gathered(_problem_fields(problem))) if fields is not None
        }
        if problem is None and found:
            problem = LoraCoreError(**next(iter(found.values())))  # the class is lost, but `code` identifies the error
        if isinstance(problem, LoraCoreError):
            problem.ranks = tuple(found)
        if problem is not None:
            raise problem

    def by_leader(self, act: Callable[[], T]) -> T | None:
        """Call `act` on the leader only and return its result (None on others). Errors are raised on every rank."""
        with self.sharing_errors():
            return act() if self.leads else None

    def shared_out(self, sizes: Sequence[int], *, short: Collection[int] = ()) -> list[int]:
        """Return the rank that computes each of `sizes` (tokens of slices, in order).

        Ranks get about the same number of tokens, and no rank's slices precede those of a lower rank. `short` are
        ranks, but not all, on which this single slice did not fit. Another rank gets it, since free memory differs.
        """
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
        """Add each part to the flat vector `total`, in order.

        `holder` is the rank whose `total` is current, or None if the sum is still 0. Each part is (rank, vector). The
        vector is only read on that rank, and is None if it is included in `total` already. Returns the rank that
        holds the sum. On other ranks `total` is undefined until `spread`.
        """
        runs = [(rank, [part for _, part in run]) for rank, run in groupby(parts, key=lambda part: part[0])]
        for start in range(0, total.numel() if runs else 0, CARRIED_NUMBERS):
            piece, at = slice(start, start + CARRIED_NUMBERS), holder
            for rank, own in runs:
                self._forward(total[piece], at, rank)
                if rank == self.rank:
                    for part in own:
                        if part is not None:
                            total[piece].add_(part[piece])
                at = rank
        return runs[-1][0] if runs else holder

    def _forward(self, piece: Tensor, at: int | None, rank: int) -> None:
        if at is None or at == rank:
            return
        if self.rank == at:
            dist.send(piece, dst=rank)
        elif self.rank == rank:
            dist.recv(piece, src=at)

    def spread(self, total: Tensor, *, holder: int | None) -> None:
        """Copy the holder's `total` to every rank."""
        if self.size > 1 and holder is not None:
            dist.broadcast(total, src=holder)


ALONE = Ranks()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """The rendezvous of a trainer that runs on several machines."""

    address: str
    """Address of the leader's machine, the only one on which a socket listens."""
    interface: str
    """Network interface of this machine for messages between ranks."""
    port: Callable[[], int]
    """Returns the port of the leader's store. Blocks until it is known. Called on all ranks except the leader."""
    report_port: Callable[[int], None]
    """Publishes the port. Called on the leader."""
    name: str
    """Separates this rendezvous from others that use the same store."""
    first_rank: int
    num_ranks: int
    """Number of ranks on all machines."""
    seconds: float
    """Timeout for reaching the leader's store. Waiting there for the other ranks is limited by `silence_seconds`."""


def join(
    device: str, *, silence_seconds: float, rendezvous: Rendezvous | None = None, file: Path | None = None
) -> Ranks:
    """Join the ranks that `accelerate launch` or torchrun started with this process. Call it once per process.

    Args:
        device: Torch device, such as "cpu" or "cuda:0". It selects the backend.
        silence_seconds: Timeout after which a rank that waits for another one raises an error.
        rendezvous: How the ranks connect, if they run on several machines.
        file: Path of a new file for a rendezvous on one machine, so that no store has to listen on a port. None uses
            the launcher's rendezvous.

    Returns:
        ALONE if there is only one process.
    """
    own_rank, num_own = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_own == 1 and rendezvous is None:
        return ALONE
    kind = device.partition(":")[0]
    if kind == "cuda":
        torch.cuda.set_device(device)
    given: dict[str, Any] = {}
    if rendezvous is not None:
        given = _rendezvous_options(rendezvous, own_rank)
    elif file is not None:
        given = {"store": _kept(file, silence_seconds), "rank": own_rank, "world_size": num_own}
    if kind == "cuda":
        # Without it, NCCL creates a communicator for each pair of ranks that send to each other.
        given["device_id"] = torch.device(device)
    dist.init_process_group(BACKENDS[kind], timeout=timedelta(seconds=silence_seconds), **given)
    ranks = Ranks(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        is_multi_node=rendezvous is not None,
        is_first_elsewhere=rendezvous is not None and own_rank == 0 and rendezvous.first_rank > 0,
    )
    connect_all(ranks, device)
    return ranks


def connect_all(ranks: Ranks, device: str) -> None:
    """Send a number from every rank to every higher one, and broadcast one from rank 0.

    NCCL allocates the channel between two ranks in device memory when they first communicate. Doing it here makes a
    later measurement of free memory correct and avoids running out of memory during training.
    """
    number = torch.zeros(1, device=device)
    for low, high in combinations(range(ranks.size), 2):
        if ranks.rank == low:
            dist.send(number, dst=high)
        elif ranks.rank == high:
            dist.recv(number, src=low)
    ranks.spread(number, holder=0)


def _kept(file: Path, silence_seconds: float) -> FileStore:
    """Return a file store, which outlives each rank, so that the reason for a failure can be read after an exit."""
    store = FileStore(str(file), -1)
    store.set_timeout(timedelta(seconds=silence_seconds))
    return store


def _rendezvous_options(rendezvous: Rendezvous, own_rank: int) -> dict[str, Any]:
    """Create the store of a rendezvous on several machines.

    torch's own rendezvous would listen on every address of the machine, so the leader passes a bound socket to it.
    """
    rank = rendezvous.first_rank + own_rank
    os.environ |= {"GLOO_SOCKET_IFNAME": rendezvous.interface, "NCCL_SOCKET_IFNAME": f"={rendezvous.interface}"}
    timeout = timedelta(seconds=rendezvous.seconds)
    if rank == 0:
        listening = socket.create_server((rendezvous.address, 0), backlog=rendezvous.num_ranks)
        port = int(listening.getsockname()[1])
        store = TCPStore(
            rendezvous.address,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        rendezvous.report_port(port)
    else:
        store = TCPStore(rendezvous.address, rendezvous.port(), is_master=False, timeout=timeout)
    named = PrefixStore(rendezvous.name, store)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(rendezvous.num_ranks)}  # for libraries that read them
    return {"store": named, "rank": rank, "world_size": rendezvous.num_ranks}


def end_process() -> NoReturn:
    """Destroy the process group and exit with status 0. Call it on every rank at the end.

    The interpreter is not finalized: a thread of gloo that releases its last tensor during finalization would abort
    the process (pytorch/pytorch#190489).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _problem_fields(problem: LoraCoreError | OSError | None) -> dict[str, str] | None:
    if problem is None:
        return None
    if isinstance(problem, OSError):
        return {"message": f"{problem}.", "remedy": "Check the disk of that machine.", "code": "disk_error"}
    return {"message": problem.message, "remedy": problem.remedy, "code": problem.code}


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(content: Tensor) -> Any:
    return json.loads(content.numpy().tobytes())
