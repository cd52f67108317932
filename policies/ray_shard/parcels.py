"""Whole models as parcels: small, because weights that lie in a file travel as the file's path and an offset.

What has no file travels by value, in buffers beside the pickled bytes: a store that processes share holds each once, and
whoever unpacks reads the weights there. Everything else is pickled as cloudpickle does: what can be imported by its name, the
other process imports.
"""
from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files.bank import Bank
from ..files.provenance import Finder
from . import rebuilding
from .packing import Packer, SourceFile
from .rebuilding import Pieces, Unpacker


@dataclass(frozen=True)
class Parcel:
    """A pickled object.

    Attributes:
        data: the pickled bytes.
        buffers: arrays of bytes, over the sender's own memory until somebody copies or stores them.
        weights: for each buffer, whether it is a large parameter's.
        mapped_bytes: of tensors that travel as a place in a file.
        copied_bytes: of tensors that travel by value.
        files: what must be there, unchanged, where it is unpacked, or be sent.
    """

    data: bytes
    buffers: list[Any]
    weights: tuple[bool, ...]
    mapped_bytes: int
    copied_bytes: int
    files: tuple[SourceFile, ...]

    def digest(self) -> str:
        """Of all that is in it, tensors too."""
        made = hashlib.sha256(self.data)
        for buffer in self.buffers:
            made.update(buffer)
        return made.hexdigest()


def pack(value: Any, bank: Bank | None = None, known: Mapping[int, str] | None = None, files: bool = True) -> Parcel:
    """Pickles anything. Tensors of other devices travel by value, and arrive on the CPU.

    Args:
        bank: knows where mapped tensors come from on systems that do not list mappings.
        known: `id` of objects that the receiver has, and what it calls them.
        files: whether to look for the files of tensors; what is computed has none.

    Raises:
        FileChanged: a file of weights was cut short under its mapping.
        pickle.PicklingError, TypeError: there is something in it that cannot be pickled.
    """
    packer = Packer(Finder(bank) if files else None, known or {})
    packer.dump(value)
    return Parcel(packer.stream.getvalue(), packer.buffers, tuple(packer.weights), packer.mapped_bytes, packer.copied_bytes,
                  packer.files())


def unpack(parcel: Parcel, writable: bool = False, known: Mapping[str, Any] | None = None, sent: Sequence[Pieces] = ()) -> Any:
    """The object again. Mapped tensors are this process's own to write to: written pages become private.

    Args:
        writable: copies every tensor that came by value. Without it, parameters of 1 MiB and more lie over the parcel's
            buffers, which are read-only if a store shares them among processes: **writing to such a parameter in place ends
            the process** (SIGSEGV), so whoever patches weights in place copies them first. Smaller ones, and tensors that are
            no parameters, are always copied.
        known: what the sender called by these names.
        sent: what is used of files that are not here, to be read as what came by value.

    Raises:
        FileChanged: a file is not the one that the weights were mapped from.
        ValueError: a tensor is said to reach beyond its memory.
    """
    if len(parcel.buffers) != len(parcel.weights):
        raise ValueError(f"a parcel with {len(parcel.buffers)} buffers says what {len(parcel.weights)} are")
    buffers = [buffer if shared and not writable else rebuilding.writable(buffer)
               for buffer, shared in zip(parcel.buffers, parcel.weights, strict=True)]
    return Unpacker(io.BytesIO(parcel.data), buffers, known or {}, sent).load()
