"""What the system says of a mapping's pages: still mapped? written to? in the page cache? And reading a cold file ahead.

Everything here has an answer for "this system does not tell" (None): Windows and macOS have no /proc, and the kernel keeps
the page cache's state of other people's files to itself.
"""
from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import psutil

CHUNK = 16 * 2**20


def _regions(start: int, end: int, path: str) -> list[Any] | None:
    """The process's regions in [start, end) that map `path`; None where the system does not tell.

    Args:
        path: with links resolved, as the system lists it.
    """
    try:
        regions = psutil.Process().memory_maps(grouped=False)
    except (AttributeError, psutil.Error, OSError, NotImplementedError):
        return None
    name = os.path.basename(path)
    inside = []
    for region in regions:
        first, _, last = region.addr.partition("-")
        if not last:  # Windows tells where a region begins, not where it ends
            return None
        if int(first, 16) < end and int(last, 16) > start and name in region.path:
            inside.append(region)
    return inside


class Region(NamedTuple):
    """Addresses of this process that show a file.

    Attributes:
        start, end: its first address, and the one past its last.
        path: as the system lists it, with links resolved.
        offset: of its first byte in the file.
        listed: (device, inode) as the system lists them, which on some file systems (btrfs, overlays) is not what stat says.
        rights: as the system lists them, "rw-p" for a copy-on-write mapping.
    """

    start: int
    end: int
    path: str
    offset: int
    listed: tuple[int, int]
    rights: str

    @property
    def private(self) -> bool:
        """Pages that are written become this process's own."""
        return self.rights.endswith("p")

    @property
    def writes_through(self) -> bool:
        """What is written is the file's."""
        return "w" in self.rights and not self.private

    @classmethod
    def parse(cls, line: str) -> Region | None:
        """Of a line of /proc/self/maps (proc_pid_maps(5)); None if it maps no file that is still under its name."""
        fields = line.rstrip("\n").split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].endswith(" (deleted)"):
            return None
        addresses, rights, offset, device, inode, path = fields
        start, _, end = addresses.partition("-")
        major, _, minor = device.partition(":")
        number = os.makedev(int(major, 16), int(minor, 16))
        return cls(int(start, 16), int(end, 16), path, int(offset, 16), (number, int(inode)), rights)


def mapped_files() -> list[Region]:
    """Each region of this process that maps a file, in order; none where the system does not tell.

    Files that were removed or replaced since are left out: under their name there is nothing, or another file.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            regions = [Region.parse(line) for line in file]
    except OSError:
        return []
    return [region for region in regions if region is not None]


def written(start: int, end: int) -> bool | None:
    """Whether a page of a copy-on-write mapping in [start, end) was written to; None where the system does not tell.

    Asks for these pages alone (/proc/self/pagemap, 8 bytes a page), so it is the one to ask for each of many tensors.
    """
    first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            entries = numpy.frombuffer(file.read((last - first) * 8), numpy.uint64)
    except OSError:
        return None
    if len(entries) != last - first:
        return None
    state = entries >> numpy.uint64(61)  # present, swapped, of a file: the kernel's Documentation/admin-guide/mm/pagemap.rst
    return bool(((state == 0b100) | (state & numpy.uint64(0b010) != 0)).any())


def may_map(path: str) -> bool:
    """Windows charges a copy-on-write view to the commit limit in full: there, only what fits into half of what is left."""
    if os.name != "nt":
        return True
    left = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        return os.path.getsize(path) < left // 2
    except OSError:
        return False


def is_mapped(start: int, end: int, path: str) -> bool | None:
    """Whether any of the file's pages are still mapped at these addresses."""
    regions = _regions(start, end, path)
    return None if regions is None else bool(regions)


def is_pristine(start: int, end: int, path: str) -> bool | None:
    """Whether no page of a copy-on-write mapping was written to: a written page has become anonymous memory,
    or swap."""
    regions = _regions(start, end, path)
    if not regions or not hasattr(regions[0], "anonymous"):
        return None
    return all(region.anonymous == 0 and region.swap == 0 for region in regions)


def resident_fraction(start: int, end: int, path: str) -> float | None:
    """How much of a mapping is in the page cache, 0 to 1 (mincore(2)).

    Linux answers "all" for files that the process neither owns nor may write, so for these the answer is None.
    """
    if sys.platform == "win32" or not os.access(path, os.W_OK):
        return None
    start -= start % mmap.PAGESIZE
    pages = -(-(end - start) // mmap.PAGESIZE)
    vector = ctypes.create_string_buffer(pages)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), vector) != 0:
        return None
    # The low bit says "resident"; the others are reserved, and zero on every kernel that has them.
    return (pages - vector.raw.count(b"\0")) / pages


def cached_fraction(path: str) -> float | None:
    """How much of a file is in the page cache, 0 to 1; None where the system does not tell.

    Raises:
        OSError: the file cannot be opened.
    """
    if sys.platform == "win32" or not os.path.getsize(path):
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        view = numpy.frombuffer(mapping, numpy.uint8)
        start, size = view.ctypes.data, len(view)
        del view  # a mapping with a view cannot be closed
        return resident_fraction(start, start + size, path)


def read_ahead(path: str, limit: int, progress: Callable[[int, int], None]) -> int:
    """Reads a file from its start, in large pieces, so that it is in the page cache; returns the bytes read.

    Args:
        limit: stop after this many bytes.
        progress: called after each piece with (bytes read, bytes in all); what it raises stops the reading.

    Raises:
        OSError: the file cannot be read.
    """
    size = min(os.path.getsize(path), limit)
    done = 0
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while done < size:
            count = file.readinto(buffer[:size - done])
            if not count:
                break
            done += count
            progress(done, size)
    return done


class Reporter:
    """Calls `say` with a percentage every two seconds, so that a user sees a long read move."""

    def __init__(self, say: Callable[[int], None], every: float = 2.0) -> None:
        self._say, self._every, self._next = say, every, time.monotonic() + every

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._say(100 * done // max(1, total))
