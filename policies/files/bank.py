"""One copy-on-write mapping of each weight file, kept for the next load within a budget.

`safetensors` maps the file and checks its header; we keep its handle, which keeps the mapping. A mapping is *leased*: while
tensors of one lease live, another load of the same file gets a mapping of its own. Those share every page of the page
cache, so that costs no memory, and what one model writes in place never shows in another, as with ComfyUI's private copies.

The bank also knows which file any tensor's memory comes from, by its address, however the tensor came about.
Windows: a copy-on-write view is charged to the commit limit in full and locks the file, so there nothing idle is kept.
"""
from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import safetensors
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...telemetry import emit
from . import gguf_header, pages
from .gguf_file import GGUFFile
from .identity import Identity

KEEPS_IDLE = os.name != "nt"


@dataclass(eq=False)
class MappedFile:
    """A weight file that is mapped.

    Attributes:
        start, end: the addresses of its first and past its last tensor byte.
        handle: keeps the mapping and gives tensors again; None once the bank let go, or where the tensors are all there is.
        used: when it was last leased, in seconds of the monotonic clock.
        target: the path with links resolved, as the system's list of mappings has it.
    """

    path: str
    identity: Identity
    start: int
    end: int
    handle: Any
    used: float = field(default_factory=time.monotonic)
    target: str = field(init=False)
    _storages: list[StorageWeakRef] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target = os.path.realpath(self.path)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def in_use(self) -> bool:
        """Whether a tensor that was handed out lives."""
        while self._storages and self._storages[-1].expired():  # type: ignore[no-untyped-call]
            self._storages.pop()
        return bool(self._storages)

    def lend(self, tensors: Iterable[torch.Tensor]) -> None:
        """Remembers the tensors that are handed out, without keeping them."""
        self.used = time.monotonic()
        self._storages = [
            StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Lease:
    """The tensors of one load. `fresh` is false where the mapping was there already; `gguf` is there for such a file."""

    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, str] | None
    file: MappedFile
    fresh: bool
    gguf: GGUFFile | None


class Bank:
    """All mappings of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._files: list[MappedFile] = []

    def lease(self, path: str) -> Lease:
        """Maps a safetensors or GGUF file, or finds it mapped, unchanged and unwritten.

        Tensors are created in the caller's inference mode, and share memory with the file.

        Raises:
            OSError: the file cannot be read.
            safetensors.SafetensorError, gguf_header.GGUFError: its header is not one.
        """
        identity = Identity.of(path)
        with self._lock:
            file = self._idle(path, identity)
            fresh = file is None
            handle = file.handle if file else _open(path)
            # Handles of safetensors are context managers that hand out themselves.
            try:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  it is no dict
            except (TypeError, RuntimeError) as error:  # torch on a shape beyond 64 bits, which the header's check lets pass
                raise safetensors.SafetensorError(f"a tensor cannot be made: {error}") from error
            if file is None:
                file = MappedFile(path, identity, *_span(tensors.values()), handle)
                self._files.append(file)
            file.lend(tensors.values())
            return Lease(tensors, handle.metadata(), file, fresh, handle if isinstance(handle, GGUFFile) else None)

    def adopt(self, path: str, tensors: Iterable[torch.Tensor]) -> MappedFile | None:
        """Takes note of tensors that somebody else mapped from a file (torch's own mmap). None if they are private after all.

        Raises:
            OSError: the file cannot be looked at.
        """
        tensors = list(tensors)
        file = MappedFile(path, Identity.of(path), *_span(tensors), handle=None)
        # With one private tensor among them, the span holds memory of others too.
        if file.end - file.start > file.identity.size or pages.is_mapped(file.start, file.end, file.target) is False:
            return None
        self._note(file, tensors)
        return file

    def recognise(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes note of tensors that somebody else mapped, by what the system says of their memory (`weights.mapped`)."""
        unknown = [tensor for tensor in tensors if tensor.numel() and self.file_of(tensor) is None]
        started = time.perf_counter()
        regions = pages.mapped_files() if unknown else []
        inside: dict[pages.Region, list[torch.Tensor]] = defaultdict(list)
        for tensor in unknown:
            index = bisect_right(regions, tensor.data_ptr(), key=lambda region: region.start) - 1
            if index >= 0 and tensor.data_ptr() + tensor.nbytes <= regions[index].end:
                inside[regions[index]].append(tensor)
        for region, mapped in inside.items():
            with suppress(OSError):  # gone already
                file = MappedFile(region.path, Identity.of(region.path), *_span(mapped), handle=None)
                self._note(file, mapped)
                emit("weights.mapped", file=file.name, bytes=sum(tensor.nbytes for tensor in mapped), copied_bytes=0,
                     seconds=time.perf_counter() - started)

    def _note(self, file: MappedFile, tensors: Iterable[torch.Tensor]) -> None:
        with self._lock:
            file.lend(tensors)
            self._files.append(file)

    def file_of(self, tensor: torch.Tensor) -> MappedFile | None:
        """The file that a tensor's memory is mapped from; None for a private copy or another device."""
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        address = tensor.data_ptr()
        with self._lock:
            for file in self._files:
                # Once the last tensor is gone its addresses may belong to anybody.
                if file.start <= address < file.end and (file.handle is not None or file.in_use()):
                    return file
        return None

    def live(self) -> list[MappedFile]:
        """The files of which tensors live."""
        with self._lock:
            return [file for file in self._files if file.in_use()]

    def sweep(self, keep_bytes: int) -> int:
        """Lets go of idle files beyond the budget, least recently used first, and of changed ones; returns the idle bytes
        kept. Files that are gone for good are checked to be unmapped, and recorded (`weights.released`)."""
        with self._lock:
            idle = [file for file in self._files if file.handle is not None and not file.in_use()]
            kept = 0
            names: set[str] = set()
            for file in sorted(idle, key=lambda file: -file.used):
                size = file.identity.size
                if KEEPS_IDLE and kept + size <= keep_bytes and file.path not in names and not _changed(file):
                    kept += size
                    names.add(file.path)
                else:
                    file.handle = None
            for file in [file for file in self._files if file.handle is None and not file.in_use()]:
                self._files.remove(file)
                _record_release(file)
            return kept

    def empty(self) -> None:
        """Lets go of everything; what models still use stays mapped until they are gone."""
        gguf_header.forget()
        with self._lock:
            for file in self._files:
                file.handle = None
            self.sweep(0)

    def _idle(self, path: str, identity: Identity) -> MappedFile | None:
        for file in self._files:
            if file.handle is None or file.path != path or file.in_use():
                continue
            if file.identity == identity and pages.is_pristine(file.start, file.end, file.target):
                return file
            file.handle = None  # changed on disk, written to, or the system does not tell: never served again
        return None


def _open(path: str) -> Any:
    if path.lower().endswith(".gguf"):
        return GGUFFile(path)
    return safetensors.safe_open(path, framework="pt", device="cpu")


def _span(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """The addresses of the first and past the last byte."""
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.numel()]
    return min((start for start, _ in spans), default=0), max((end for _, end in spans), default=0)


def _changed(file: MappedFile) -> bool:
    try:
        return Identity.of(file.path) != file.identity
    except OSError:
        return True


def _record_release(file: MappedFile) -> None:
    mapped = pages.is_mapped(file.start, file.end, file.target)
    emit("weights.released", file=file.name, bytes=file.identity.size, unmapped=None if mapped is None else not mapped)
