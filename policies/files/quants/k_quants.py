"""Q2_K to Q6_K: blocks of 256 elements in groups of 16 or 32, whose scales are small integers times the block's float16 d.

The formats are block_q2_K to block_q6_K of ggml-common.h.
"""
from __future__ import annotations

import torch

from .bits import BITS, CRUMBS, NIBBLES, Scaled, fields, half


def _scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each, from 12 bytes: each (n, 8), float32.

    Bytes 0 to 3 have the scales 0 to 3, bytes 4 to 7 the minima 0 to 3, bytes 8 to 11 four low bits of the scales and four of
    the minima 4 to 7, whose two high bits are at the top of bytes 0 to 7 (get_scale_min_k4 of ggml-quants.c).
    """
    first, second = packed[:, :8], packed[:, 8:]
    low = first & 63
    high = fields(second, NIBBLES, 15).view(-1, 8) | (first >> 2 & 48)
    scales, minima = torch.cat((low.view(-1, 2, 4), high.view(-1, 2, 4)), 2).float().unbind(1)
    return scales, minima


def _offset(minimum: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    return (minimum * minima).neg_().unsqueeze(-1)


def q2_k(blocks: torch.Tensor) -> Scaled:
    """16 bytes of scale and minimum nibbles, 64 of 2-bit q, d, dmin: q * (d * scale) - dmin * minimum, groups of 16."""
    values = fields(blocks[:, 16:80].view(-1, 2, 32), CRUMBS, 3).view(-1, 16, 16)
    scales, minima = fields(blocks[:, :16], NIBBLES, 15).float().unbind(1)
    return Scaled(values, (half(blocks, 80) * scales).unsqueeze(-1), _offset(half(blocks, 82), minima))


def q3_k(blocks: torch.Tensor) -> Scaled:
    """32 bytes of third bits, 64 of 2-bit q, 12 of 6-bit scales, d: (q - 4) * (d * (scale - 32)), groups of 16."""
    values = fields(blocks[:, 32:96].view(-1, 2, 32), CRUMBS, 3).view(-1, 16, 16)
    values |= fields(blocks[:, :32], BITS, 1).mul_(4).view(-1, 16, 16)
    scales = fields(blocks[:, 96:104], NIBBLES, 15).view(-1, 16)
    scales |= fields(blocks[:, 104:108], CRUMBS, 3).mul_(16).view(-1, 16)
    scales = scales.view(torch.int8).sub_(32)
    return Scaled(values.view(torch.int8).sub_(4), (half(blocks, 108) * scales).unsqueeze(-1))


def q4_k(blocks: torch.Tensor) -> Scaled:
    """d, dmin, 12 bytes of scales and minima, nibbles: q * (d * scale) - dmin * minimum, groups of 32."""
    values = fields(blocks[:, 16:].view(-1, 4, 32), NIBBLES, 15).view(-1, 8, 32)
    scales, minima = _scales(blocks[:, 4:16])
    return Scaled(values, (half(blocks, 0) * scales).unsqueeze(-1), _offset(half(blocks, 2), minima))


def q5_k(blocks: torch.Tensor) -> Scaled:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i of byte j is element j of group i."""
    values = fields(blocks[:, 48:].view(-1, 4, 32), NIBBLES, 15).view(-1, 8, 32)
    values |= fields(blocks[:, 16:48], BITS, 1).mul_(16)
    scales, minima = _scales(blocks[:, 4:16])
    return Scaled(values, (half(blocks, 0) * scales).unsqueeze(-1), _offset(half(blocks, 2), minima))


def q6_k(blocks: torch.Tensor) -> Scaled:
    """128 bytes of nibbles, 64 of two high bits, 16 signed scales, d: (q - 32) * (d * scale), groups of 16."""
    values = fields(blocks[:, :128].view(-1, 2, 64), NIBBLES, 15).view(-1, 16, 16)
    values |= fields(blocks[:, 128:192].view(-1, 2, 32), CRUMBS, 3).mul_(16).view(-1, 16, 16)
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return Scaled(values.view(torch.int8).sub_(32), scale.unsqueeze(-1))
