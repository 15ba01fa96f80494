# pyright: strict
"""Who may keep how much within a budget of bytes: the accounts alone, not what is kept.

A job reads its rows once an epoch, each time in another order. To make room there by what was used longest ago would
throw nearly all out before it is read again; so what a job has on a full shelf stays, and what comes later isn't taken.
Room is made by what belongs to no job any more, and from the job that has most, until both have as much.
"""

from collections import OrderedDict
from collections.abc import Iterable

Key = bytes
NOBODY = ""


class Shelf:
    """Entries by the job that used each last; of each job, the one used longest ago comes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._owner_of: dict[Key, str] = {}
        self._entries: dict[str, OrderedDict[Key, int]] = {}
        self._bytes: dict[str, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._owner_of

    def __len__(self) -> int:
        return len(self._owner_of)

    @property
    def num_bytes(self) -> int:
        return sum(self._bytes.values())

    def use(self, key: Key, job: str) -> None:
        """It is the job's from now on, and its newest."""
        self._insert(key, self.remove(key), job)

    def place(self, key: Key, num_bytes: int, job: str) -> dict[Key, str] | None:
        """Take a new entry in. What had to go for it, with whose it was; None where it isn't taken: then nothing
        goes."""
        victims = self._victims(num_bytes, job)
        if victims is None:
            return None
        owners = {victim: self._owner_of[victim] for victim in victims}
        for victim in victims:
            self.remove(victim)
        self._insert(key, num_bytes, job)
        return owners

    def remove(self, key: Key) -> int:
        """Its bytes."""
        owner = self._owner_of.pop(key)
        num_bytes = self._entries[owner].pop(key)
        self._bytes[owner] -= num_bytes
        return num_bytes

    def leave(self, job: str) -> None:
        """Its entries stay, for whoever has the same sequences, until room is wanted."""
        for key, _ in list(self._of(job)):
            self.use(key, NOBODY)
        self._entries.pop(job, None)
        self._bytes.pop(job, None)

    def _insert(self, key: Key, num_bytes: int, job: str) -> None:
        self._owner_of[key] = job
        self._entries.setdefault(job, OrderedDict())[key] = num_bytes
        self._bytes[job] = self._bytes.get(job, 0) + num_bytes

    def _victims(self, num_bytes: int, job: str) -> list[Key] | None:
        wanted = self.num_bytes + num_bytes - self.max_bytes
        victims: list[Key] = []
        for key, size in self._of(NOBODY):
            if wanted <= 0:
                break
            victims.append(key)
            wanted -= size
        others = [owner for owner in self._bytes if owner not in (job, NOBODY)]
        richest = max(others, key=lambda owner: self._bytes[owner], default=NOBODY)
        surplus = self._bytes.get(richest, 0) - self._bytes.get(job, 0) - num_bytes
        for key, size in self._of(richest):
            if wanted <= 0 or richest == NOBODY or size > surplus:
                break
            victims.append(key)
            wanted -= size
            surplus -= size
        return victims if wanted <= 0 else None

    def _of(self, job: str) -> Iterable[tuple[Key, int]]:
        return self._entries[job].items() if job in self._entries else ()
