"""Blocks of any GGUF type, with edge cases, and what the gguf package makes of them."""
from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch

# Zeros, the smallest and the largest subnormal, one, the largest number, infinities and NaNs, as float16.
EDGES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01], dtype=np.uint16)


def random_bytes(kind: Any, blocks: int, seed: int = 0) -> torch.Tensor:
    """(blocks, size): any bytes, and an edge case of a float16 wherever in the first, or the last four, bytes one may be."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (blocks, kind.size), dtype=np.uint8)
    starts = [start for start in (0, 2, kind.size - 4, kind.size - 2) if 0 <= start <= kind.size - 2]
    for row in range(0, blocks, 2):
        start = starts[row // 2 % len(starts)]
        data[row, start:start + 2] = np.frombuffer(random.choice(EDGES).tobytes(), dtype=np.uint8)
    return torch.from_numpy(data)


def reference(raw: torch.Tensor, kind: Any) -> torch.Tensor:
    """What `gguf` makes of the bytes, flat."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.array(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.number)))).flatten()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit (so zeros have their signs), any NaN being equal to any."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    words = {4: torch.int32, 2: torch.int16}[one.dtype.itemsize]
    return bool(((one.view(words) == other.view(words)) | (one.isnan() & other.isnan())).all())
