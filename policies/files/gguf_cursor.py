"""Steps through a GGUF header: the preamble and the values, of which nothing is decoded yet.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("File Structure").
"""
from __future__ import annotations

import os
import struct

import numpy as np

from .gguf_values import ARRAY, BOOL, NUMBERS, STRING, Buffer, Place, end_of_strings

LONGEST_NAME = 65535

AGAIN = "it is cut short or damaged: download it again"
NEWER = "a newer program wrote it: update ComfyUI's gguf package and this plugin, or convert the model again"
CONVERT = "whatever wrote it made a mistake: download it again, or convert the model again"


class GGUFError(ValueError):
    """A GGUF file that cannot be used: the message has the file, the tensor or key, what is wrong, and what to do."""


class Cursor:
    """Reads on through a header; `of` is the tensor or key at hand, for messages."""

    def __init__(self, buffer: Buffer, path: str) -> None:
        self.buffer, self.size, self.at, self.of = buffer, len(buffer), 0, ""
        self._file = os.path.basename(path)

    def error(self, what: str, cure: str = AGAIN) -> GGUFError:
        return GGUFError(": ".join(filter(None, [self._file, self.of[:200], f"{what}; {cure}"])))

    def take(self, code: str) -> tuple[int, ...]:
        """Numbers, by `struct`'s little-endian codes."""
        start = self.skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.buffer, start)

    def skip(self, count: int) -> int:
        """Moves past that many bytes, and returns where they begin."""
        if count > self.size - self.at:
            raise self.error(f"the header goes on past byte {self.size}, where the file ends")
        self.at += count
        return self.at - count

    def name(self, what: str) -> str:
        (length,) = self.take("Q")
        if length > LONGEST_NAME:
            raise self.error(f"{what} of {length} bytes, more than {LONGEST_NAME}")
        start = self.skip(length)
        try:
            return str(self.buffer[start:start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {start} is not UTF-8") from None

    def holds(self, count: int, least: int, what: str) -> None:
        """Refuses a count of things that the rest of the file has no room for, at `least` bytes each."""
        if count * least > self.size - self.at:
            raise self.error(f"{count} {what} are announced, the file ends before")


def preamble(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of pairs."""
    if bytes(cursor.buffer[:4]) != b"GGUF":
        raise cursor.error("no GGUF file, it does not begin with GGUF", "choose another file, or download it again")
    cursor.skip(4)
    (version,) = cursor.take("I")
    if version and not version & 0xFFFF:
        raise cursor.error("a big-endian GGUF file, for other processors than this one",
                           "download the little-endian one, or turn it with gguf's gguf-convert-endian")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}, we read 2 and 3", NEWER if version > 3 else "convert the model again")
    tensors, pairs = cursor.take("QQ")
    cursor.holds(tensors, 24, "tensors")
    cursor.holds(pairs, 13, "values")
    return version, tensors, pairs


def pairs(cursor: Cursor, count: int) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for _ in range(count):
        pair, cursor.of = cursor.at, ""
        key = cursor.name("a key")
        cursor.of = f"key {key!r}"
        if key in places:
            raise cursor.error("is there twice", CONVERT)
        places[key] = _place(cursor, pair)
    cursor.of = ""
    return places


def _place(cursor: Cursor, pair: int) -> Place:
    """Where the next value lies; moves past it."""
    (kind,) = cursor.take("I")
    element, count = kind, 1
    if kind == STRING:
        (count,) = cursor.take("Q")
        return Place(pair, kind, kind, cursor.skip(count), count)
    if kind == ARRAY:
        element, count = cursor.take("IQ")
    start = cursor.at
    if element == STRING:
        cursor.holds(count, 8, "strings")
        try:
            cursor.skip(end_of_strings(cursor.buffer, start, count) - start)
        except (struct.error, OverflowError):
            raise cursor.error("its strings go on past the end of the file") from None
    elif element in NUMBERS:
        cursor.skip(count * NUMBERS[element].itemsize)
        if element == BOOL and not _truth(cursor, start):
            raise cursor.error("a truth value that is neither 0 nor 1")
    elif element == ARRAY:
        raise cursor.error("an array of arrays, which nobody reads", "convert the model again")
    else:
        raise cursor.error(f"values of type {element}, which is unknown", NEWER)
    return Place(pair, kind, element, start, count)


def _truth(cursor: Cursor, start: int) -> bool:
    return not bytes(cursor.buffer[start:cursor.at]).strip(b"\0\1")


def alignment(cursor: Cursor, place: Place | None) -> int:
    if place is None:
        return 32
    cursor.of = "key 'general.alignment'"
    if place.kind != 4:
        raise cursor.error("is no uint32", CONVERT)
    value = int(np.frombuffer(cursor.buffer, NUMBERS[4], 1, place.offset)[0])
    if value < 8 or value & (value - 1):
        raise cursor.error(f"is {value}, not 8 or a higher power of two", CONVERT)
    return value
