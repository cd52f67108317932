"""What a parcel asks for where it is unpacked: each function makes again one kind of thing that `packing` took apart."""
from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch

from ..files.identity import Identity
from ..files.maps import MAPS, view
from ..files.provenance import extent


class FileName(NamedTuple):
    """What a file is called in a parcel: its path, and its identity where it was packed."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, identity: Identity) -> FileName:
        return cls(path, identity.device, identity.inode, identity.size, identity.mtime_ns)

    @property
    def identity(self) -> Identity:
        return Identity(*self[1:])


@dataclass(frozen=True)
class Pieces:
    """What is used of a file, for where that is missing.

    Attributes:
        name: of the file, in the parcel.
        buffers: arrays of bytes, by (bytes from the file's start, bytes).
        shared: those of large parameters, which are read where the store has them.
    """

    name: FileName
    buffers: Mapping[tuple[int, int], Any]
    shared: frozenset[tuple[int, int]]

    def at(self, offset: int, size: int) -> Any:
        place = offset, size
        return self.buffers[place] if place in self.shared else writable(self.buffers[place])


class Unpacker(pickle.Unpickler):
    """Finds what the sender knew to be here already, and files."""

    def __init__(self, stream: io.BytesIO, buffers: Iterable[Any], known: Mapping[str, Any],
                 sent: Sequence[Pieces] = ()) -> None:
        super().__init__(stream, buffers=buffers)
        self._known = known
        self._files: dict[FileName, Any] = {pieces.name: pieces for pieces in sent}

    def persistent_load(self, name: Any) -> Any:
        if isinstance(name, str):
            return self._known[name]
        file = FileName(*name)
        if file not in self._files:  # it is looked at once, not for each tensor
            self._files[file] = MAPS.file(file.path, file.identity)
        return self._files[file]


def _storage(held: Any) -> torch.UntypedStorage:
    """Of a file, or of bytes; bytes among the pickled ones, and unaligned ones, are copied."""
    if isinstance(held, torch.UntypedStorage):
        return held
    array = numpy.frombuffer(held, numpy.uint8) if len(held) else numpy.empty(0, numpy.uint8)
    if isinstance(held, (bytes, bytearray)) or array.ctypes.data % 16:
        array = writable(array)
    if array.flags.writeable:
        return torch.from_numpy(array).untyped_storage()
    with warnings.catch_warnings():  # of what is not to be written to, as `unpack` says
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(array).untyped_storage()


def plain(held: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], parameter: bool,
          requires_grad: bool, inference: bool) -> torch.Tensor:
    if isinstance(held, Pieces):
        held, offset = held.at(offset, extent(dtype.itemsize, shape, stride)), 0
    with torch.inference_mode(inference):
        tensor = view(_storage(held), offset, dtype, shape, stride)
        return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


def subclass(kind: type, own: torch.Tensor, requires_grad: bool, inference: bool) -> torch.Tensor:
    with torch.inference_mode(inference), torch._C.DisableTorchFunctionSubclass():
        return own.as_subclass(kind).requires_grad_(requires_grad)


def wrapper(kind: Any, parts: dict[str, torch.Tensor], context: Any, shape: tuple[int, ...], stride: tuple[int, ...],
            requires_grad: bool, inference: bool) -> Any:
    with torch.inference_mode(inference):
        made = kind.__tensor_unflatten__(parts, context, shape, stride)
        return made.requires_grad_() if requires_grad else made


def new(kind: type) -> Any:
    return object.__new__(kind)


def update(made: Any, state: dict[str, Any]) -> None:
    vars(made).update(state)


def complete(made: Any, state: dict[str, Any]) -> None:
    """Sets what the class did not set by itself, as that a tensor is a parameter."""
    vars(made).update({name: value for name, value in state.items() if name not in vars(made)})


def writable(buffer: Any) -> Any:
    """An array of the same bytes that may be written to, aligned as torch aligns."""
    source = numpy.frombuffer(buffer, numpy.uint8)
    copied = torch.empty(source.nbytes, dtype=torch.uint8).numpy()
    copied[:] = source
    return copied
