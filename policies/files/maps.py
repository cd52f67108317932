"""Tensors over the files that another process had them from (`provenance`), without a copy of their bytes."""
from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .identity import Identity
from .likeness import Likeness
from .provenance import FileChanged, Provenance, extent


class Maps:
    """The files that this process mapped for tensors that came by provenance: each once, while one of its tensors lives.

    Mappings are copy-on-write: what is written in place stays in this process, and costs it the written pages.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[tuple[str, Identity], StorageWeakRef] = {}
        self._alike: dict[tuple[str, Identity], Identity] = {}  # what a file of another machine's is here

    def file(self, path: str, identity: Identity) -> torch.UntypedStorage:
        """The bytes of a whole file.

        Raises:
            FileChanged: there is no such file, or it is not the one with this identity.
        """
        with self._lock:
            identity = self._alike.get((path, identity), identity)
            key = path, identity
            _verify(path, identity)
            known = _alive(self._mapped.get(key))
            if known is not None:
                return known
            storage = _copy_on_write(path, identity.size)
            _verify(path, identity)  # it may have been replaced in between
            self._mapped = {mapped: kept for mapped, kept in self._mapped.items() if _alive(kept) is not None}
            self._mapped[key] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            return storage

    def tensor(self, found: Provenance, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
        """The tensor that a provenance was found for, made in the caller's inference mode.

        Raises:
            FileChanged: the file is not the one that it was found in.
            ValueError: the tensor would reach beyond the file.
        """
        try:
            return view(self.file(found.path, found.identity), found.offset, dtype, shape, stride)
        except ValueError as error:
            raise ValueError(f"{found.path}: {error}") from None

    def accept(self, identity: Identity, likeness: Likeness) -> bool:
        """Takes the file under this path for the one that another machine has under it, if it is like that one. It must not
        change from then on.

        Args:
            identity: there.
        """
        here = likeness.here()
        with self._lock:
            if here is None:
                self._alike.pop((likeness.path, identity), None)
            else:
                self._alike[likeness.path, identity] = here
        return here is not None

    def paths(self) -> list[str]:
        """The files that are mapped now."""
        with self._lock:
            return [path for (path, _), kept in self._mapped.items() if _alive(kept) is not None]


MAPS = Maps()


def view(storage: torch.UntypedStorage, offset: int, dtype: torch.dtype, shape: Sequence[int],
         stride: Sequence[int]) -> torch.Tensor:
    """A tensor over memory; over a copy where its offset, in bytes, is not one that the dtype can have.

    Raises:
        ValueError: it would reach beyond the memory, or cannot exist.
    """
    size = extent(dtype.itemsize, shape, stride)
    if offset < 0 or offset + size > storage.nbytes():
        raise ValueError(f"a tensor of {size} bytes at byte {offset} does not lie within {storage.nbytes()} bytes")
    place = storage.device
    if offset % dtype.itemsize:
        storage = torch.empty(0, dtype=torch.uint8, device=place).set_(storage, offset, (size,), (1,)).clone().untyped_storage()
        offset = 0
    return torch.empty(0, dtype=dtype, device=place).set_(storage, offset // dtype.itemsize, tuple(shape), tuple(stride))


def _verify(path: str, identity: Identity) -> None:
    try:
        same = Identity.of(path) == identity
    except OSError:
        same = False
    if not same:
        raise FileChanged(path)


def _copy_on_write(path: str, size: int) -> torch.UntypedStorage:
    storage: Any = torch.UntypedStorage.from_file(path, False, size)  # torch's types call it what it is not
    return storage  # type: ignore[no-any-return]


def _alive(kept: StorageWeakRef | None) -> torch.UntypedStorage | None:
    found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(kept.cdata) if kept is not None else None
    return found
