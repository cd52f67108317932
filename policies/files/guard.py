"""Keeps a file's pages in the page cache: a populated, read-only, shared mapping of our own.

The kernel does not drop pages that a process has mapped, not even where somebody asks it to (`POSIX_FADV_DONTNEED`), as
ComfyUI's reader does after each read. The pages stay clean: under memory pressure the kernel takes them back as any others.

Linux only. Windows keeps a file's pages on its standby list as it sees fit, and locks a file that is mapped; macOS has no
such request to withstand. There a guard holds nothing, and `Guard.of` is None.
"""
from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable

from . import pages
from .identity import Identity

CHUNK = 64 * 2**20
_MAP_SHARED, _MAP_POPULATE, _FAILED = 0x01, 0x8000, ctypes.c_void_p(-1).value


class Guard:
    """The mapping of one file, made a piece at a time. It never reads through the mapping, so a file that is cut short under
    it cannot fault.

    Attributes:
        size: bytes mapped so far.
    """

    def __init__(self, path: str, identity: Identity) -> None:
        self.path, self.identity = path, identity
        self.size = 0
        self._pieces: list[tuple[int, int]] = []
        self._lock, self._closed = threading.Lock(), False

    @classmethod
    def of(cls, path: str) -> Guard | None:
        """None where the system has no use for it.

        Raises:
            OSError: the file cannot be looked at.
        """
        return cls(path, Identity.of(path)) if sys.platform == "linux" else None

    @property
    def complete(self) -> bool:
        return self.size >= self.identity.size

    def populate(self, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Maps what is not mapped yet, reading what is not in the page cache; whether all of it is.

        Args:
            go_on: asked before each piece.

        Raises:
            OSError: the file cannot be opened or mapped.
        """
        if self.complete:
            return True
        file = os.open(self.path, os.O_RDONLY)
        try:
            while not self.complete and go_on():
                with self._lock:
                    if self._closed or Identity.of(self.path) != self.identity:
                        return False
                    if not self.complete:  # another thread may be at it too
                        self._map(file)
        finally:
            os.close(file)
        return self.complete

    def _map(self, file: int) -> None:
        """One more piece. Not by Python's `mmap`, which holds the interpreter's lock while the kernel reads."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        count = min(CHUNK, self.identity.size - self.size)
        address = libc.mmap(None, count, mmap.PROT_READ, _MAP_SHARED | _MAP_POPULATE, file, self.size)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), f"cannot map {self.path}")
        self._pieces.append((address, count))
        self.size += count

    def resident(self) -> int | None:
        """Bytes of it in the page cache now; None where the system does not tell."""
        total = 0
        with self._lock:
            for address, count in self._pieces:
                fraction = pages.resident_fraction(address, address + count, self.path)
                if fraction is None:
                    return None
                total += int(fraction * count)
        return total

    def close(self) -> None:
        """Unmaps it. The pages stay in the cache until the kernel wants them."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        with self._lock:
            self._closed = True
            pieces, self._pieces, self.size = self._pieces, [], 0
        for address, count in pieces:
            libc.munmap(address, count)
