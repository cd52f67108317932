"""RAM and device budgets: one ledger that every policy draws from, and the words for where weights live.

Limits come from the container (cgroup v2, then v1) where there is one; `psutil` shows the host's.
"""
from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

GB = 2**30
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE = 2**20  # bytes
_CGROUPS = Path("/sys/fs/cgroup")
_PRESSURE, _VMSTAT = Path("/proc/pressure/memory"), Path("/proc/vmstat")


class Residency(Enum):
    """Where a weight's bytes are."""

    DEVICE = "device"
    PINNED = "pinned"
    MAPPED = "mapped"  # in a file's mapping: page cache, no private copy
    HOST = "host"      # a private copy in RAM


@dataclass(frozen=True)
class ProcessMemory:
    """What this process holds, in bytes. `file` is shared with the page cache, `private` is not."""

    private: int
    file: int
    storage_read: int


def process_memory() -> ProcessMemory:
    """Linux tells private from file-backed pages; elsewhere all counts as private. Unknown is 0."""
    process = psutil.Process()
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        private, file = (int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    except (OSError, KeyError):
        private, file = process.memory_info().rss, 0
    try:
        counters = process.io_counters()
        read = getattr(counters, "read_bytes", 0)
    except (AttributeError, psutil.Error, OSError):  # macOS has no counters; some containers hide them
        read = 0
    return ProcessMemory(private, file, read)


def _cgroup_folder() -> list[tuple[Path, str, str, str]]:
    """(folder, limit file, usage file, prefix of the counters) of this process's memory cgroups, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container's own namespace the path may name a folder that only the host sees; then the root is ours.
        for candidate in (folder, *folder.parents):
            if (candidate / names[0]).exists():
                found.append((candidate, *names))
            if candidate == root:
                break
    return found


def ram() -> tuple[int, int]:
    """(total, available) RAM in bytes, of the tightest limit that holds for this process."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for folder, limit_file, usage_file, prefix in _cgroup_folder():
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / usage_file).read_text())
            stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # "max": no limit here
            continue
        if limit < total:
            total = limit
        # Mapped weights that were read twice are "active"; the kernel takes back both kinds before it refuses.
        cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        available = min(available, limit - used + cache)
    return total, max(0, available)


def trim() -> None:
    """Gives freed memory back to the system. glibc alone keeps what lies between blocks that live; elsewhere, nothing to do."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl has no such call
            ctypes.CDLL(None).malloc_trim(0)


def keep_little() -> None:
    """From now on large pieces of memory go back to the system as they are freed.

    glibc keeps them, up to 32 MB each, and 64 MB at the end of what a thread allocates from, which `trim` does not reach.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


@dataclass(frozen=True)
class Pressure:
    """How hard memory was to get so far, in the container or else on the machine.

    Attributes:
        stalled: seconds that some task waited for memory (PSI).
        scanned: pages that the kernel looked at to take them back. The machine's seconds are those of every container in it,
            also of one that is short within its own limit; where the machine is short itself, this number grows too.
    """

    stalled: float
    scanned: int


def pressure() -> Pressure | None:
    """None where the kernel does not tell."""
    groups = ((folder / "memory.pressure", folder / "memory.stat", ("pgscan",)) for folder, *_ in _cgroup_folder())
    for file, counters, names in (*groups, (_PRESSURE, _VMSTAT, ("pgscan_kswapd", "pgscan_direct"))):
        try:
            some = file.read_text().splitlines()[0]
            stat = dict(line.split(" ", 1) for line in counters.read_text().splitlines())
            return Pressure(int(some.rpartition("total=")[2]) / 1e6, sum(int(stat[name]) for name in names))
        except (OSError, ValueError, IndexError, KeyError):  # cgroup v1, or a kernel without PSI
            continue
    return None


@dataclass(frozen=True)
class Limits:
    """The `[memory]` table, in bytes; None is "auto"."""

    ram: int | None = None
    pinned: int | None = None
    pad: int | None = None

    @classmethod
    def from_gb(cls, ram_gb: float | str, pinned_gb: float | str, pad_gb: float | str) -> Limits:
        return cls(*(None if isinstance(value, str) else int(value * GB) for value in (ram_gb, pinned_gb, pad_gb)))


class Ledger:
    """Who keeps how many bytes of RAM: policies ask for `room` before they keep, and `book` what they keep.

    Books hold only what outlives the work at hand; what a running model needs is the host's business.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, Residency], int] = {}

    def pad(self) -> int:
        """RAM to leave alone, in bytes. In a small container 2 GB would be all there is."""
        if self.limits.pad is not None:
            return self.limits.pad
        total = ram()[0]
        return min(max(2 * GB, total // 10), total // 4)

    def room(self, owner: str, residency: Residency) -> int:
        """Bytes that `owner` may keep in all, of this kind, given what the others keep and what is free now.

        Mapped bytes are page cache, which the system can take back, so they are part of what is free already; private
        and pinned bytes are not, so what the owner has counts as free again.
        """
        with self._lock:
            own = self._kept.get((owner, residency), 0)
            kept = sum(self._kept.values()) - own
            pinned = sum(size for (_, where), size in self._kept.items() if where is Residency.PINNED) - own
        room = ram()[1] - self.pad() + (0 if residency is Residency.MAPPED else own)
        if self.limits.ram is not None:
            room = min(room, self.limits.ram - kept)
        if residency is Residency.PINNED:
            # Half of what is free: page-locked memory is the one kind that the system can never take back.
            room = room // 2 if self.limits.pinned is None else min(room, self.limits.pinned - pinned)
        return max(0, room)

    def book(self, owner: str, residency: Residency, size: int) -> None:
        """Notes that `owner` now keeps `size` bytes of this kind."""
        with self._lock:
            self._kept[owner, residency] = size
