"""What a GGUF file says of itself: its values and where its tensors lie, without a Python object for each array element.

The file is not trusted: no count is believed beyond what the bytes that are left can hold.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; four dimensions at most, no arrays of arrays, and
alignments that are powers of two, as ggml's own reader has it (ggml/src/gguf.cpp).
"""
from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from . import gguf_cursor
from .gguf_cursor import AGAIN, CONVERT, NEWER, Cursor, GGUFError
from .gguf_values import Buffer, Values
from .identity import Identity

__all__ = ["GGUFError", "Header", "TensorInfo", "forget", "of", "type_sizes"]

# Windows keeps a mapped file from being replaced: there a copy of the header's bytes stays instead.
KEEPS_MAPPED = os.name != "nt"
MOST_DIMENSIONS = 4
KEPT = 8


class TensorInfo(NamedTuple):
    """A tensor in the file.

    Attributes:
        kind: ggml's number of the type.
        shape: in elements, as torch has it: the file's dimensions in reverse.
        offset: of its first byte in the file.
        size: in bytes.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Header:
    """A header that was read. It holds a read-only mapping for its values, which shows what is in the file now.

    Attributes:
        kv: the values by key, decoded when asked for.
        tensors: by name, in the file's order.
        alignment: of tensors, in bytes.
        table: offset of the first tensor's entry.
        end: offset past the last entry.
        data_offset: where the first tensor may lie; `TensorInfo.offset` has it in already.
        seconds: that reading it took.
    """

    path: str
    version: int
    kv: Values
    tensors: Mapping[str, TensorInfo]
    alignment: int
    table: int
    end: int
    data_offset: int
    seconds: float = 0.0

    @property
    def architecture(self) -> str | None:
        value = self.kv.get("general.architecture")
        return value if isinstance(value, str) else None

    @classmethod
    def read(cls, path: str, sizes: Mapping[int, tuple[int, int]] | None = None) -> Header:
        """
        Args:
            sizes: (elements, bytes) of a block, by the number of the tensor type; None asks the gguf package.

        Raises:
            OSError: the file cannot be read.
            GGUFError: it is no GGUF file that we can use. No mapping stays.
        """
        started = time.perf_counter()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:  # which cannot be mapped
                raise GGUFError(f"{os.path.basename(path)}: the file is empty; {AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                header = cls.parse(whole, path, size, sizes)
                places, end = header.kv.places, header.end
                kept = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) if KEEPS_MAPPED else whole[:end]
        return replace(header, kv=Values(kept, places), seconds=time.perf_counter() - started)

    @classmethod
    def parse(cls, buffer: Buffer, path: str, file_size: int, sizes: Mapping[int, tuple[int, int]] | None = None) -> Header:
        """Reads a header from memory, which the result keeps.

        Args:
            buffer: the file's first bytes, all of the header at least.
            path: for messages.
            file_size: in bytes; tensors have to lie within.

        Raises:
            GGUFError: it is no GGUF file that we can use.
        """
        cursor = Cursor(buffer, path)
        version, tensor_count, pair_count = gguf_cursor.preamble(cursor)
        places = gguf_cursor.pairs(cursor, pair_count)
        alignment = gguf_cursor.alignment(cursor, places.get("general.alignment"))
        table = cursor.at
        entries = _entries(cursor, tensor_count)
        data_offset = -(-cursor.at // alignment) * alignment
        sizes = type_sizes() if sizes is None else sizes
        tensors = {name: _tensor(cursor, name, entry, sizes, alignment, data_offset, file_size)
                   for name, entry in entries.items()}
        return cls(path, version, Values(buffer, places), tensors, alignment, table, cursor.at, data_offset)

    def close(self) -> None:
        """Gives the mapping back; values cannot be decoded after, `tensors` stays.

        Arrays that were handed out keep the mapping until they are gone. Without this, it goes with the header.
        """
        self.kv.close()


class _Entry(NamedTuple):
    """As it stands in the tensor table: dimensions innermost first, the offset from where the data begins."""

    dimensions: tuple[int, ...]
    kind: int
    offset: int


def _entries(cursor: Cursor, count: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        cursor.of = ""
        name = cursor.name("a tensor's name")
        cursor.of = f"tensor {name!r}"
        if name in entries:
            raise cursor.error("is there twice", CONVERT)
        (depth,) = cursor.take("I")
        if depth > MOST_DIMENSIONS:
            raise cursor.error(f"has {depth} dimensions, more than {MOST_DIMENSIONS}")
        *dimensions, kind, offset = cursor.take(f"{depth}QIQ")
        entries[name] = _Entry(tuple(dimensions), kind, offset)
    return entries


def _tensor(cursor: Cursor, name: str, entry: _Entry, sizes: Mapping[int, tuple[int, int]], alignment: int, start: int,
            file_size: int) -> TensorInfo:
    cursor.of = f"tensor {name!r}"
    if entry.kind not in sizes:
        raise cursor.error(f"is of type {entry.kind}{_type_name(entry.kind)}, which is unknown", NEWER)
    block, size = sizes[entry.kind]
    row = entry.dimensions[0] if entry.dimensions else 1
    if row % block:
        raise cursor.error(f"rows of {row} elements, not a multiple of its type's block of {block}", CONVERT)
    # An empty tensor is fine, but its other dimensions have to fit as well.
    if math.prod(extent or 1 for extent in entry.dimensions) >= 2**63:
        raise cursor.error(f"impossible dimensions {entry.dimensions}")
    if entry.offset % alignment:
        raise cursor.error(f"begins at {entry.offset}, which is not aligned to {alignment} bytes", CONVERT)
    offset, size = start + entry.offset, math.prod(entry.dimensions) // block * size
    if offset + size > file_size:
        raise cursor.error(f"ends at byte {offset + size}, the file at {file_size}")
    return TensorInfo(name, entry.kind, entry.dimensions[::-1], offset, size)


@lru_cache(maxsize=1)
def type_sizes() -> Mapping[int, tuple[int, int]]:
    """(elements, bytes) of a block, by the number of the tensor type, as the gguf package has them.

    Raises:
        GGUFError: it is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise GGUFError("the gguf package is missing: pip install gguf") from error
    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


def _type_name(number: int) -> str:
    try:
        from gguf.constants import GGMLQuantizationType
        return f" ({GGMLQuantizationType(number).name})"
    except (ImportError, ValueError):
        return ""


_lock = threading.Lock()
_known: OrderedDict[str, tuple[Identity, Header]] = OrderedDict()


def of(path: str) -> Header:
    """The header of a file, read once while the file stays the same; the latest few are kept. Not to be closed.

    Raises:
        OSError: the file cannot be read.
        GGUFError: it is no GGUF file that we can use.
    """
    identity = Identity.of(path)
    with _lock:
        then, header = _known.pop(path, (None, None))
        if header is None or then != identity:
            header = Header.read(path)
        _known[path] = identity, header
        while len(_known) > KEPT:
            _known.popitem(last=False)
        return header


def forget() -> None:
    """Lets go of every header that is kept; those in use stay whole."""
    with _lock:
        _known.clear()
