"""The loads that are kept, within the budget: least recently used leaves first, `keep` last.

What a running workflow uses is not ours to count or to drop: letting go of it would free nothing. It counts from the moment
on when nobody uses it any more.
"""
from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ...telemetry import emit
from ..files.guard import Guard
from ..files.identity import Identity
from ..memory import Ledger, Residency, ram, trim
from ..models import Kept, Recipe
from .keys import Key

NAME = "preload_cache"
REST = 60.0  # seconds without a guard, after the system ran short of memory


@dataclass(eq=False)
class Entry:
    """One load that is kept.

    Attributes:
        label: how it is called for the user.
        files: each path with its identity when it was loaded.
        mapped: its weights are (mostly) a file's mapping, so their RAM is page cache.
        where: bytes by residency when last looked at.
        used: seconds of the monotonic clock.
    """

    key: Key
    kept: Kept
    label: str
    kind: str
    files: tuple[tuple[str, Identity], ...]
    recipe: Recipe | None = None
    keep: bool = False
    mapped: bool = False
    where: Mapping[Residency, int] = field(default_factory=dict)
    hits: int = 0
    used: float = field(default_factory=time.monotonic)

    def measure(self) -> None:
        self.where = self.kept.residency()

    @property
    def private(self) -> int:
        """Bytes of private RAM, page-locked ones too."""
        return self.where.get(Residency.HOST, 0) + self.where.get(Residency.PINNED, 0)

    @property
    def file_bytes(self) -> int:
        return sum(identity.size for _, identity in self.files)


def unchanged(path: str, then: Identity) -> bool:
    """Whether a file is there as it was."""
    try:
        return Identity.of(path) == then
    except OSError:
        return False


class Entries:
    """All that is kept. Not safe for threads by itself.

    Args:
        same: whether a file is what it was when it was loaded.
    """

    def __init__(self, ledger: Ledger, same: Callable[[str, Identity], bool] = unchanged) -> None:
        self._ledger, self._same = ledger, same
        self._entries: dict[Key, Entry] = {}
        self._gone: dict[Key, str] = {}  # why an entry left, to say so at the next miss
        self._guards: dict[Identity, Guard] = {}
        self._rest_until = 0.0

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def find(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def why_not(self, key: Key) -> str:
        """Why there is no such entry."""
        return self._gone.get(key, "not loaded before")

    def add(self, entry: Entry) -> str | None:
        """Keeps an entry, for which others may have to leave. Why not, if it alone is larger than the budget."""
        entry.measure()
        entry.mapped = entry.private < entry.file_bytes / 2
        size, residency = (entry.file_bytes, Residency.MAPPED) if entry.mapped else (entry.private, Residency.HOST)
        # What is private and in use is not free any more: without it, the room is what it was before the load.
        room = self._ledger.room(NAME, residency) + (0 if entry.mapped else entry.private)
        if self._ledger.limits.ram is not None:
            room = min(room, self._ledger.limits.ram)
        if size > room:
            return f"it takes {size >> 20} MB, the budget is {room >> 20} MB"
        self._entries[entry.key] = entry
        self._gone.pop(entry.key, None)
        self.fit()
        return None

    def fit(self) -> None:
        """Lets go of what is over the budget now."""
        for entry in self:
            entry.measure()
        self._book()
        private, mapped = (self._ledger.room(NAME, kind) for kind in (Residency.HOST, Residency.MAPPED))
        leaving: list[Entry] = []
        for entry in self._idle():
            too_much = [self._private(leaving) > private and entry.private > 0, self._mapped(leaving) > mapped and entry.mapped]
            if any(too_much):
                leaving.append(entry)
        self.evict(leaving, "over the budget")

    def give_back(self, size: int, why: str) -> int:
        """Lets go of idle entries until this many bytes of private RAM are free again; returns how many are.

        Where that is not enough, the guards go too: the kernel may then take pages that nobody maps first.
        """
        leaving: list[Entry] = []
        freed = 0
        for entry in self._idle():
            entry.measure()
            if freed < size and entry.private > 0:
                leaving.append(entry)
                freed += entry.private
        self.evict(leaving, why)
        if freed < size and self._guards:
            self._rest_until = time.monotonic() + REST
            self._drop_guards()
        return freed

    def left(self) -> int:
        """Bytes that may still be kept before something has to leave."""
        return self._ledger.room(NAME, Residency.MAPPED) - self._mapped([])

    def make_room(self, size: int) -> None:
        """Lets go of what would stand in the way of a load of this many bytes."""
        short = size + self._ledger.pad() - ram()[1]
        if short > 0:
            self.give_back(short, "room for another model")

    def evict(self, entries: Iterable[Entry], why: str) -> None:
        entries = list(entries)
        for entry in entries:
            del self._entries[entry.key]
            self._gone[entry.key] = why
            entry.kept.drop()
            emit("cache.evicted", model=entry.label, bytes=entry.file_bytes, private_bytes=entry.private, reason=why)
        self._drop_guards()
        if entries:
            gc.collect()  # models die in cycles
            trim()
            self._book()

    def drop_changed(self) -> None:
        """Lets go of entries whose files are not what they were."""
        self.evict([entry for entry in self if not self._whole(entry)], "its file was changed or is gone")

    def guards(self) -> list[Guard]:
        """The guards of mapped entries that are to be filled, within the budget; the most recently used file first."""
        self._drop_guards()
        room = self._ledger.room(NAME, Residency.MAPPED) if time.monotonic() >= self._rest_until else 0
        found: dict[Identity, Guard] = {}
        for entry in sorted(self, key=lambda entry: (-entry.keep, -entry.used)):
            for path, identity in entry.files if entry.mapped and self._whole(entry) else ():
                guard = found.get(identity) or self._guards.get(identity) or Guard.of(path)
                if identity not in found and guard is not None and identity.size <= room:
                    room -= identity.size
                    found[identity] = self._guards[identity] = guard
        return [guard for guard in found.values() if not guard.complete]

    def cached_bytes(self, entry: Entry) -> int | None:
        """Bytes of an entry's guarded files in the page cache; None where the system does not tell."""
        sizes = [self._guards[identity].resident() for _, identity in entry.files if identity in self._guards]
        return None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)

    def _whole(self, entry: Entry) -> bool:
        return all(self._same(path, identity) for path, identity in entry.files)

    def _drop_guards(self) -> None:
        wanted = {identity for entry in self if entry.mapped for _, identity in entry.files}
        if time.monotonic() < self._rest_until:
            wanted = set()
        for identity in [identity for identity in self._guards if identity not in wanted]:
            self._guards.pop(identity).close()

    def _idle(self) -> list[Entry]:
        """What may leave, in the order in which it leaves."""
        return sorted((entry for entry in self if not entry.kept.in_use()), key=lambda entry: (entry.keep, entry.used))

    def _private(self, without: list[Entry]) -> int:
        return sum(entry.private for entry in self._idle() if entry not in without)

    def _mapped(self, without: list[Entry]) -> int:
        files = {identity: identity.size for entry in self if entry.mapped and entry not in without
                 for _, identity in entry.files}
        return sum(files.values())

    def _book(self) -> None:
        self._ledger.book(NAME, Residency.HOST, self._private([]))
        self._ledger.book(NAME, Residency.MAPPED, self._mapped([]))


def label(paths: tuple[str, ...]) -> str:
    return " + ".join(map(os.path.basename, paths))
