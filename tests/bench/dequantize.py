"""How fast weights are dequantised on the CPU, beside the `gguf` package and ComfyUI-GGUF: `python dequantize.py [PATH]`.

PATH is a checkout of ComfyUI-GGUF. Both sides take turns, so that a machine that slows down slows both; two threads, as the
servers of the other benchmarks have.
"""
from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from support.loading import load  # noqa: E402
from table import show  # noqa: E402

load()
from residency.policies.files import quants  # noqa: E402

TITLE = "Dequantised on the CPU, two threads: GB/s of float32 written, and the speed relative to others' (more is better)"
HEAD = ("type", "GB/s", "/ gguf (numpy)", "/ ComfyUI-GGUF float32", "float16", "bfloat16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTS = 2**23  # 32 MB of float32
PAIRS = 9
ROW = 4096


def table(comfyui_gguf: Path | None, pairs: int = PAIRS) -> list[tuple[object, ...]]:
    """A row for each type that is not float32 or float16 anyway, as in HEAD; "-" where the other side does not have it.

    Args:
        comfyui_gguf: a checkout of ComfyUI-GGUF.
        pairs: how often each side is measured; the ratios are medians of the pairs' ratios.
    """
    pack = _load(comfyui_gguf) if comfyui_gguf else None
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with np.errstate(all="ignore"):  # random scales overflow
            return [_row(kind, pack, pairs) for kind in quants.KINDS.values() if kind.name not in ("F32", "F16")]
    finally:
        torch.set_num_threads(threads)


def _row(kind: quants.Kind, pack: Any, pairs: int) -> tuple[object, ...]:
    number = gguf.GGMLQuantizationType(kind.number)
    shape = (ELEMENTS // ROW, ROW)
    data = np.random.default_rng(kind.number).integers(0, 256, (shape[0], ROW // kind.block * kind.size), dtype=np.uint8)
    raw = torch.from_numpy(data)

    def ours(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: quants.dequantize(raw, kind.number, shape, dtype)

    def theirs(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: pack.dequantize(raw, number, shape, dtype).to(dtype)

    seconds, ratio = _compare(ours(torch.float32), lambda: gguf.quants.dequantize(data, number), pairs)
    others: list[object] = ["-"] * len(DTYPES)
    if pack is not None and number in pack.dequantize_functions:
        others = [_compare(ours(dtype), theirs(dtype), pairs)[1] for dtype in DTYPES]
    return (kind.name, 4e-9 * ELEMENTS / seconds, ratio, *others)


def _compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> tuple[float, float]:
    """Our seconds, and our speed relative to the other side's: medians of pairs after one to warm up."""
    took: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for turn in range(pairs + 1):
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            start = time.perf_counter()
            side()
            took[side].append(time.perf_counter() - start)
    return (statistics.median(took[ours][1:]),
            statistics.median(other / our for our, other in zip(took[ours][1:], took[theirs][1:], strict=True)))


def _load(checkout: Path) -> Any:
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", checkout / "dequant.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    show(TITLE, HEAD, table(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
