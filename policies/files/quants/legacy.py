"""Q4_0 to Q8_0: blocks of 32 elements with a float16 scale d, and some with a float16 minimum m.

The formats are block_q4_0 to block_q8_0 of ggml-common.h. The low nibbles of the 16 bytes are the first 16 elements.
"""
from __future__ import annotations

import torch

from . import tables
from .bits import NIBBLES, Scaled, fields, half, lookup


def _groups(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(len(blocks), 1, 32)


def _five_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """4 bytes of fifth bits, from element 0 at the lowest, then 16 bytes of nibbles: (n, 1, 32)."""
    low = fields(blocks[:, start + 4:], NIBBLES, 15)
    high = lookup(tables.table("fifth bits", blocks), blocks[:, start:start + 4])
    return _groups(low).bitwise_or_(_groups(high.view(torch.uint8)))


def q4_0(blocks: torch.Tensor) -> Scaled:
    """d, nibbles: (q - 8) * d."""
    values = _groups(fields(blocks[:, 2:], NIBBLES, 15)).view(torch.int8).sub_(8)
    return Scaled(values, half(blocks, 0).unsqueeze(-1))


def q4_1(blocks: torch.Tensor) -> Scaled:
    """d, m, nibbles: q * d + m."""
    values = _groups(fields(blocks[:, 4:], NIBBLES, 15))
    return Scaled(values, half(blocks, 0).unsqueeze(-1), half(blocks, 2).unsqueeze(-1))


def q5_0(blocks: torch.Tensor) -> Scaled:
    """d, fifth bits, nibbles: (q - 16) * d."""
    return Scaled(_five_bits(blocks, 2).view(torch.int8).sub_(16), half(blocks, 0).unsqueeze(-1))


def q5_1(blocks: torch.Tensor) -> Scaled:
    """d, m, fifth bits, nibbles: q * d + m."""
    return Scaled(_five_bits(blocks, 4), half(blocks, 0).unsqueeze(-1), half(blocks, 2).unsqueeze(-1))


def q8_0(blocks: torch.Tensor) -> Scaled:
    """d, signed bytes: q * d."""
    return Scaled(blocks[:, 2:].view(torch.int8).unsqueeze(1), half(blocks, 0).unsqueeze(-1))
