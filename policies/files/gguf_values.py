"""The values in a GGUF header, decoded when they are asked for: only where each one lies is kept.

Value types are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("File Structure").
"""
from __future__ import annotations

import array
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from mmap import mmap
from typing import Any, NamedTuple, Union, overload

import numpy as np

Buffer = Union[mmap, memoryview, bytes]

BOOL, STRING, ARRAY = 7, 8, 9
# Of fixed size, by the number of the value type.
NUMBERS: dict[int, np.dtype[Any]] = {number: np.dtype(code) for number, code in {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"}.items()}

_LENGTH = struct.Struct("<Q").unpack_from


class Place(NamedTuple):
    """Where a value lies in the file.

    Attributes:
        pair: offset of the key's length, where the pair begins.
        kind: the value's type.
        element: the elements' type for an array; else `kind`.
        offset: of the first number, of the first string's length in an array of them, or of a lone string's text.
        length: of numbers or strings; of bytes for a lone string.
    """

    pair: int
    kind: int
    element: int
    offset: int
    length: int


def end_of_strings(buffer: Buffer, offset: int, count: int) -> int:
    """The offset past `count` strings, which may lie past the buffer's end. Each is a uint64 length and that many bytes.

    Only the lengths are looked at: under a tenth of a microsecond each, and there are half a million.

    Raises:
        struct.error, OverflowError: a length lies past the end.
    """
    length = _LENGTH
    for _ in range(count):
        offset += 8 + length(buffer, offset)[0]
    return offset


class Strings(Sequence[str]):
    """An array of strings in the file. Bytes that are not UTF-8 become U+FFFD; `raw` has them as they are.

    The first look at an element walks the lengths once, and keeps eight bytes for each.
    """

    def __init__(self, buffer: Buffer, offset: int, count: int) -> None:
        self._buffer, self._offset, self._count = buffer, offset, count

    @cached_property
    def _ends(self) -> array.array[int]:
        """Where each string's text ends."""
        length, offset = _LENGTH, self._offset
        ends = array.array("q")
        for _ in range(self._count):
            offset += 8 + length(self._buffer, offset)[0]
            ends.append(offset)
        return ends

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._count))]
        return str(self.raw(index), "utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        buffer, start = self._buffer, self._offset
        for end in self._ends:
            yield str(buffer[start + 8:end], "utf-8", "replace")
            start = end

    def raw(self, index: int) -> bytes:
        """The bytes of one string.

        Raises:
            IndexError: there is no such string.
        """
        index = range(self._count)[index]
        start = self._ends[index - 1] if index else self._offset
        return bytes(self._buffer[start + 8:self._ends[index]])


class Values(Mapping[str, Any]):
    """The header's values by key, in the file's order.

    Numbers, truth values and strings are Python's own; an array of numbers is a read-only numpy array in the mapping,
    an array of strings is `Strings`. Text that is not UTF-8 has U+FFFD in it; `raw` has the bytes.
    """

    def __init__(self, buffer: Buffer, places: Mapping[str, Place]) -> None:
        self._buffer: Buffer | None = buffer
        self.places = places

    def __getitem__(self, key: str) -> Any:
        """
        Raises:
            KeyError: the header has no such key.
            ValueError: the header was closed.
        """
        place = self.places[key]
        if place.kind == STRING:
            return str(self.raw(key), "utf-8", "replace")
        buffer = self._opened()
        if place.element == STRING:
            return Strings(buffer, place.offset, place.length)
        numbers = np.frombuffer(buffer, NUMBERS[place.element], place.length, place.offset)
        return numbers if place.kind == ARRAY else numbers[0].item()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def raw(self, key: str) -> bytes:
        """The bytes of a lone string.

        Raises:
            KeyError: the header has no such key.
            TypeError: it is something else.
            ValueError: the header was closed.
        """
        place = self.places[key]
        if place.kind != STRING:
            raise TypeError(f"{key} is no string")
        return bytes(self._opened()[place.offset:place.offset + place.length])

    def close(self) -> None:
        """Gives the mapping back: at once, or with the last array or `Strings` that looks into it."""
        buffer, self._buffer = self._buffer, None
        if isinstance(buffer, mmap):
            try:
                buffer.close()
            except BufferError:  # an array looks into it, and keeps it
                return

    def _opened(self) -> Buffer:
        if self._buffer is None:
            raise ValueError("the GGUF header was closed")
        return self._buffer
