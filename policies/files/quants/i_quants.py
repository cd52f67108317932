"""IQ1_S to IQ3_S: blocks of 256 elements, of which 4 or 8 at once are an entry of a grid, with signs of their own.

The formats are block_iq1_s to block_iq3_s of ggml-common.h. Their float32 scales are computed in the order of the `gguf`
package, which other orders do not always match; signs are put on the grid's integers, which is exact.
"""
from __future__ import annotations

import torch

from . import tables
from .bits import BITS, CRUMBS, NIBBLES, Scaled, fields, half, lookup, words

_SEVENS = (0, 7, 14, 21)
_THREES = (0, 3, 6, 9)


def _signed(name: str, index: torch.Tensor, signs: torch.Tensor, signs_name: str) -> torch.Tensor:
    """Grid entries with their signs: int8, (n, 256)."""
    grid = lookup(tables.table(name, index), index).view(torch.int8)
    return grid.mul_(lookup(tables.table(signs_name, index), signs).view(torch.int8))


def _quarter_scales(blocks: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """d * (scale + 1/2) / 4 from 8 bytes of nibbles: (n, 16, 1)."""
    scales = fields(packed.unsqueeze(-1), NIBBLES, 15).view(-1, 16)
    return (half(blocks, 0) * scales.float().add_(0.5)).mul_(0.25).unsqueeze(-1)


def iq2_xxs(blocks: torch.Tensor) -> Scaled:
    """d, then for each group of 32: 4 bytes of grid indices, 4 times 7 bits of signs, 4 bits of scale."""
    groups = words(blocks[:, 2:], torch.int32).view(-1, 8, 2)
    index, rest = groups.view(torch.uint8)[:, :, :4], groups[:, :, 1:]
    scale = (half(blocks, 0) * fields(rest, (28,), 15).view(-1, 8).float().add_(0.5)).mul_(0.25)
    values = _signed("IQ2_XXS", index, fields(rest, _SEVENS, 127).view(-1, 8, 4), "parity signs")
    return Scaled(values, scale.unsqueeze(-1))


def iq2_xs(blocks: torch.Tensor) -> Scaled:
    """d, 32 words of 9 bits of grid index and 7 of signs, 16 scale nibbles, groups of 16."""
    codes = words(blocks[:, 2:66], torch.int16)
    values = _signed("IQ2_XS", codes & 511, codes >> 9 & 127, "parity signs")
    return Scaled(values.view(-1, 16, 16), _quarter_scales(blocks, blocks[:, 66:]))


def iq2_s(blocks: torch.Tensor) -> Scaled:
    """d, 32 bytes of grid indices, 32 of signs, 8 of two high index bits, 16 scale nibbles, groups of 16."""
    high = fields(blocks[:, 66:74].unsqueeze(-1), CRUMBS, 3).view(-1, 32)
    values = _signed("IQ2_S", _joined(blocks[:, 2:34], high), blocks[:, 34:66], "signs")
    return Scaled(values.view(-1, 16, 16), _quarter_scales(blocks, blocks[:, 74:]))


def iq3_xxs(blocks: torch.Tensor) -> Scaled:
    """d, 64 bytes of grid indices, then for each group of 32: 4 times 7 bits of signs, 4 bits of scale."""
    rest = words(blocks[:, 66:], torch.int32).unsqueeze(-1)
    scale = (half(blocks, 0) * fields(rest, (28,), 15).view(-1, 8).float().add_(0.5)).mul_(0.5)
    values = _signed("IQ3_XXS", blocks[:, 2:66], fields(rest, _SEVENS, 127).view(-1, 32), "parity signs")
    return Scaled(values.view(-1, 8, 32), scale.unsqueeze(-1))


def iq3_s(blocks: torch.Tensor) -> Scaled:
    """d, 64 bytes of grid indices, 8 of their ninth bits, 32 of signs, 8 scale nibbles: d * (1 + 2 * scale), groups of 32."""
    high = fields(blocks[:, 66:74].unsqueeze(-1), BITS, 1).view(-1, 64)
    values = _signed("IQ3_S", _joined(blocks[:, 2:66], high), blocks[:, 74:106], "signs")
    scales = fields(blocks[:, 106:].unsqueeze(-1), NIBBLES, 15).view(-1, 8)
    return Scaled(values.view(-1, 8, 32), (half(blocks, 0) * scales.mul_(2).add_(1)).unsqueeze(-1))


def _joined(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Grid indices of more than 8 bits: int16."""
    return high.to(torch.int16).mul_(256).bitwise_or_(low)


def _eighths(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """8 * (grid - or + 1/8), where the index's top bit says minus: int8, (n, 256)."""
    return lookup(tables.table("IQ1", low), _joined(low, high)).view(torch.int8)


def iq1_s(blocks: torch.Tensor) -> Scaled:
    """d, 32 bytes of grid indices, for each group of 32 a word: 4 times 3 high index bits, 3 of scale, 1 of shift's sign."""
    codes = words(blocks[:, 34:], torch.int16)
    high = fields(codes.unsqueeze(-1), _THREES, 7).view(-1, 8, 4).bitwise_or_((codes >> 12 & 8).unsqueeze(-1))
    scale = half(blocks, 0) * (codes >> 12 & 7).mul_(2).add_(1)
    return Scaled(_eighths(blocks[:, 2:34], high.view(-1, 32)).view(-1, 8, 32), scale.mul_(0.125).unsqueeze(-1))


def iq1_m(blocks: torch.Tensor) -> Scaled:
    """32 bytes of grid indices, 32 nibbles of high index bits and shift's sign, 4 words of scales with d in their tops."""
    codes = words(blocks[:, 48:], torch.int16)
    tops = [codes[:, place:place + 1] >> 12 - 4 * place & 15 << 4 * place for place in range(3)]
    d = (tops[0] | tops[1] | tops[2] | (codes[:, 3:] & -4096)).view(torch.float16).float()
    scale = d * fields(codes.unsqueeze(-1), _THREES, 7).view(-1, 16).mul_(2).add_(1)
    high = fields(blocks[:, 32:48].unsqueeze(-1), NIBBLES, 15).view(-1, 32)
    return Scaled(_eighths(blocks[:, :32], high).view(-1, 16, 16), scale.mul_(0.125).unsqueeze(-1))
