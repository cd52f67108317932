"""`gguf.GGUFReader` becomes lazy for everybody, and what it was again."""
from __future__ import annotations

import gguf
import gguf.gguf_reader
from residency.hooks.gguf_weights.reader import LazyReader


def test_it_is_replaced_where_it_is_defined_and_exported_and_put_back() -> None:
    """A subclass of the original while on; the original itself after."""
    original, reader = gguf.GGUFReader, LazyReader()

    for _ in range(2):
        reader.turn(True)
        assert gguf.GGUFReader is gguf.gguf_reader.GGUFReader is not original
        assert issubclass(gguf.GGUFReader, original)
        reader.turn(False)
        assert gguf.GGUFReader is gguf.gguf_reader.GGUFReader is original


def test_what_somebody_else_put_there_stays() -> None:
    """Another pack's reader on top of ours is theirs to take away."""
    original, reader = gguf.GGUFReader, LazyReader()
    reader.turn(True)
    theirs = type("Theirs", (gguf.GGUFReader,), {})
    gguf.GGUFReader = theirs
    try:
        reader.turn(False)
        assert gguf.GGUFReader is theirs
        assert gguf.gguf_reader.GGUFReader is original
    finally:
        gguf.GGUFReader = gguf.gguf_reader.GGUFReader = original
