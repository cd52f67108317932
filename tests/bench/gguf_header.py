"""Our GGUF header reader beside `gguf.GGUFReader`, on the header of a model with a large vocabulary; and a fuzzer for it.

As a script: `gguf_header.py [CASES]` prints both.
"""
from __future__ import annotations

import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil

sys.path[:0] = [str(Path(__file__).parents[1])]
from support.gguf_files import finish  # noqa: E402
from support.loading import load  # noqa: E402

load()
from residency.policies.files.gguf_header import GGUFError, Header  # noqa: E402
from residency.policies.files.gguf_lazy_reader import lazy_reader  # noqa: E402

TOKENS, MERGES = 262_144, 250_000


def build(path: Path) -> None:
    """A vocabulary of Gemma's size: tokens of 1 to 14 letters, their scores and types, merges, and 400 small tensors."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop▁é", k=rng.randint(1, 14))) for _ in range(TOKENS)]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_token_list(words)
    writer.add_token_scores(np.arange(TOKENS, dtype=np.float32).tolist())
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges([f"{one[:6]} {other[:6]}" for one, other in zip(words[:MERGES], words[-MERGES:], strict=True)])
    for index in range(400):
        writer.add_tensor(f"blk.{index}.weight", np.full((4, 32), index, np.float32))
    finish(writer)


def rows(repeats: int = 7) -> list[tuple[str, float, float]]:
    """(what, seconds, times faster than `gguf.GGUFReader`): that one once, ours the best of several."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        build(path)
        stock = _seconds(lambda: gguf.GGUFReader(path))
        lazy = lazy_reader(gguf.GGUFReader)
        ours = {
            "our header": lambda: Header.read(str(path)).close(),
            "our header, and all its tokens decoded": lambda: list(Header.read(str(path)).kv["tokenizer.ggml.tokens"]),
            "lazy GGUFReader": lambda: lazy(path),
            "lazy GGUFReader, and its tensors": lambda: lazy(path).tensors,
        }
        times = {what: min(_seconds(call) for _ in range(repeats)) for what, call in ours.items()}
        times["lazy GGUFReader, and its tokens as a field"] = _seconds(lambda: lazy(path).fields["tokenizer.ggml.tokens"].data)
    return [(f"gguf.GGUFReader, {gguf_size()}", stock, 1.0), *((what, took, stock / took) for what, took in times.items())]


def gguf_size() -> str:
    return f"{TOKENS:,} tokens and {MERGES:,} merges"


def fuzz(cases: int = 20_000, seed: int = 0) -> tuple[int, int, int, float]:
    """Damages a small header at random. (cases, refused, accepted, growth of the process's peak memory in MB).

    Raises:
        AssertionError: something else than an answer or `GGUFError` came of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        _small(path)
        whole = path.read_bytes()
    rng = random.Random(seed)
    before, peak, refused = _resident(), 0, 0
    for case in range(cases):
        data = _damaged(whole, rng)
        try:
            header = Header.parse(data, "fuzz", len(data))
            for value in header.kv.values():
                list(value) if hasattr(value, "__len__") else value
        except GGUFError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {case} of seed {seed}: {error!r}") from error
        if case % 64 == 0:
            peak = max(peak, _resident())
    return cases, refused, cases - refused, max(0, peak - before) / 1e6


def _small(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "small")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{name}")(name, 7)
    writer.add_bool("bool", True)
    writer.add_array("strings", ["one", "", "drei", "x" * 300])
    writer.add_array("numbers", list(range(20)))
    for index in range(4):
        writer.add_tensor(f"t{index}", np.full((3, 32), index, np.float32))
    writer.add_tensor("q", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)


def _damaged(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a number put over eight of them, a piece cut out, or the end cut off."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, way = rng.randrange(len(data) or 1), rng.randrange(8)
        if way < 4:
            data[at:at + 1] = rng.choice((0, 1, 9, 0x7F, 0xFF, rng.randrange(256))).to_bytes(1, "little")
        elif way < 6:
            number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, len(data), rng.randrange(256)))
            data[at:at + 8] = struct.pack("<Q", number)
        elif way == 6:
            del data[at:at + rng.randrange(1, 16)]
        else:
            del data[max(at, 1):]
    return bytes(data)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    took = time.perf_counter() - start
    del result  # taking half a million objects apart is not what is timed
    return took


if __name__ == "__main__":
    from table import show

    show("GGUF header", ("", "seconds", "times faster"), rows())
    begun = time.perf_counter()
    figures = fuzz(int(sys.argv[1]) if sys.argv[1:] else 20_000)
    show("GGUF header, damaged", ("cases", "refused", "accepted", "peak memory +MB", "seconds"),
         [(*figures, time.perf_counter() - begun)])
