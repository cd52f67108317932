"""TQ1_0 and TQ2_0: blocks of 256 elements that are -d, 0 or d (block_tq1_0 and block_tq2_0 of ggml-common.h)."""
from __future__ import annotations

import torch

from . import tables
from .bits import CRUMBS, Scaled, fields, half, whole

_POWERS = (1, 3, 9, 27, 81)


def _trits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Base-3 digits from bytes that hold them as a binary fraction, first digit first.

    Multiplied by a power of 3 modulo 256, what is left of the point is gone, and the next digit is 3 times the rest.

    Args:
        packed: uint8, (n, k).

    Returns:
        uint8 from 0 to 2, (n, count * k).
    """
    if whole(packed):
        rest = packed.unsqueeze(1) * tables.numbers(_POWERS[:count], packed).view(-1, 1)
    else:
        rest = packed.new_empty((len(packed), count, packed.shape[1]))
        for index, power in enumerate(_POWERS[:count]):
            torch.mul(packed, power, out=rest[:, index])
    return (rest.to(torch.int16).mul_(3) >> 8).to(torch.int8).flatten(1)


def tq1_0(blocks: torch.Tensor) -> Scaled:
    """48 bytes of five digits (32 and 16 are laid out apart), 4 bytes of four, d: (q - 1) * d."""
    parts = [_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)]
    return Scaled(torch.cat(parts, 1).unsqueeze(1).sub_(1), half(blocks, 52).unsqueeze(-1))


def tq2_0(blocks: torch.Tensor) -> Scaled:
    """64 bytes of 2-bit q, d: (q - 1) * d."""
    values = fields(blocks[:, :64].view(-1, 2, 32), CRUMBS, 3).view(-1, 1, 256)
    return Scaled(values.view(torch.int8).sub_(1), half(blocks, 64).unsqueeze(-1))
