"""Which bytes of which file a tensor is, so that another process of this machine can have the same ones (`maps`).

Two processes that map one file share its pages in the page cache. So a mapped tensor travels as a path and an offset, and the
receiver maps the file once more. What proves that memory still *is* the file are the system's own lists of this process's
mappings and of the pages that were written to; where there are none (Windows, macOS), the mapping bank knows the offset, and
the bytes are compared.
"""
from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch

from . import pages
from .bank import Bank, MappedFile
from .gguf_file import GGUFFile
from .identity import Identity
from .pages import CHUNK, Region
from .parameters import is_plain

SMALLEST = 4096  # bytes; less than a page is cheaper sent than found


class FileChanged(RuntimeError):
    """A file is no longer the one that weights were mapped from.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)  # alone, so that the error can travel between processes
        self.path = path

    def __str__(self) -> str:
        return (f"{self.path} was changed, replaced or removed after its weights were loaded. Load the model again, "
                "and let its file be while it is in use")


@dataclass(frozen=True)
class Provenance:
    """Where a tensor's bytes begin.

    Attributes:
        path: of the file, absolute.
        identity: of the file when it was looked up.
        offset: bytes from the file's start.
    """

    path: str
    identity: Identity
    offset: int


def extent(itemsize: int, shape: Sequence[int], stride: Sequence[int]) -> int:
    """Bytes from a strided tensor's first element to past its last; 0 if it has none.

    Raises:
        ValueError: a size or stride is negative, or they differ in number.
    """
    if len(shape) != len(stride) or min((*shape, *stride), default=0) < 0:
        raise ValueError(f"no tensor has the shape {tuple(shape)} and strides {tuple(stride)}")
    if 0 in shape:
        return 0
    return itemsize * (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)))


class Finder:
    """Finds provenances by one look at this process's mappings: make one for each shipment.

    It speaks of the moment it is asked. Whoever writes to the weights afterwards writes to pages of its own, which the
    receiver never sees.
    """

    def __init__(self, bank: Bank | None = None) -> None:
        """
        Args:
            bank: asked where the system has no list of mappings; without it nothing is found there.
        """
        self._bank = bank
        self._regions = _merged(pages.mapped_files())
        self._identities: dict[tuple[str, tuple[int, int]], Identity | None] = {}

    def find(self, tensor: torch.Tensor) -> Provenance | None:
        """Of a plain strided CPU tensor of at least a page, whose bytes are those of a file, unwritten; else None.

        Memory through which writes reach the file has none: what is written later would reach the receiver too.

        Raises:
            FileChanged: the file was cut short under its mapping, so that reading the tensor would end the process.
        """
        if not is_plain(tensor) or tensor.device.type != "cpu":
            return None
        start, size = tensor.data_ptr(), extent(tensor.element_size(), tensor.shape, tensor.stride())
        if size < SMALLEST:
            return None
        if not self._regions:
            return self._ask_bank(tensor, size)
        index = bisect_right(self._regions, start, key=lambda region: region.start) - 1
        region = self._regions[index] if index >= 0 else None
        if region is None or start + size > region.end or region.writes_through:
            return None
        identity = self._identity(region)
        if identity is None:
            return None
        found = Provenance(region.path, identity, region.offset + start - region.start)
        if found.offset + size > identity.size:
            raise FileChanged(region.path)
        written = pages.written(start, start + size) if region.private else False
        if written is None:
            written = not _same_bytes(start, size, found)
        return None if written else found

    def _identity(self, region: Region) -> Identity | None:
        """Of the file that a region maps, if it is still there under its path."""
        key = region.path, region.listed
        if key not in self._identities:
            self._identities[key] = _identity(region)
        return self._identities[key]

    def _ask_bank(self, tensor: torch.Tensor, size: int) -> Provenance | None:
        file = self._bank.file_of(tensor) if self._bank is not None else None
        first = _first_offset(file) if file is not None else None
        if file is None or first is None or tensor.data_ptr() + size > file.end:
            return None
        found = Provenance(file.target, file.identity, first + tensor.data_ptr() - file.start)
        return found if _same_bytes(tensor.data_ptr(), size, found) else None


def _merged(regions: Iterable[Region]) -> list[Region]:
    """Advice to the kernel splits a mapping into regions; a tensor may lie across them."""
    merged: list[Region] = []
    for region in regions:
        last = merged[-1] if merged else None
        if last is not None and region == last._replace(start=last.end, offset=last.offset + last.end - last.start,
                                                        end=region.end):
            merged[-1] = last._replace(end=region.end)
        else:
            merged.append(region)
    return merged


def _identity(region: Region) -> Identity | None:
    """Of the regular file under a region's path; None where there is another file than the mapped one, or none."""
    try:
        region.path.encode()  # torch takes no path with bytes that are no text
        identity = Identity.of(region.path)
        if not identity.size or not os.path.isfile(region.path):
            return None
        same = region.listed == (identity.device, identity.inode) or region.listed == _listed(region.path)
    except (OSError, UnicodeEncodeError):
        return None
    return identity if same else None


def _listed(path: str) -> tuple[int, int] | None:
    """(device, inode) by which the system lists mappings of a file, seen on one that is made for it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as mapping:
        address = numpy.frombuffer(mapping, numpy.uint8).ctypes.data
        return next((region.listed for region in pages.mapped_files() if region.start <= address < region.end), None)


def _first_offset(file: MappedFile) -> int | None:
    """Where in the file the bank's first tensor byte is; None where the bank does not know the whole file."""
    if isinstance(file.handle, GGUFFile):
        return min((info.offset for info in file.handle.header.tensors.values() if info.size), default=None)
    if file.handle is None:  # somebody else's tensors, which may not be all
        return None
    try:
        with open(file.path, "rb") as opened:
            first = 8 + int.from_bytes(opened.read(8), "little")  # safetensors: the header's length, the header, no gaps
    except OSError:
        return None
    return first if file.end - file.start == file.identity.size - first else None


def _same_bytes(start: int, size: int, found: Provenance) -> bool:
    """Whether the memory holds what the file holds."""
    memory = memoryview((ctypes.c_ubyte * size).from_address(start)).cast("B")
    try:
        if Identity.of(found.path) != found.identity:
            return False
        with open(found.path, "rb", buffering=0) as file:
            file.seek(found.offset)
            return all(memory[done:done + CHUNK] == file.read(min(CHUNK, size - done)) for done in range(0, size, CHUNK))
    except OSError:
        return False
