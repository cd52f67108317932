"""Types whose nibbles are codes of 16 values: MXFP4, NVFP4, IQ4_NL and IQ4_XS (their blocks in ggml-common.h)."""
from __future__ import annotations

import torch

from . import tables
from .bits import CRUMBS, NIBBLES, Scaled, fields, half, lookup


def _values(packed: torch.Tensor, name: str) -> torch.Tensor:
    """What the codes stand for, low nibbles of a row first.

    Args:
        packed: uint8, (n, rows, k).

    Returns:
        int8, (n, rows, 2 * k).
    """
    codes = fields(packed, NIBBLES, 15).flatten(2)
    return lookup(tables.table(name, packed), codes.view(torch.int16)).view(torch.int8)


def iq4_nl(blocks: torch.Tensor) -> Scaled:
    """d, nibbles: value * d."""
    return Scaled(_values(blocks[:, 2:].unsqueeze(1), "iq4"), half(blocks, 0).unsqueeze(-1))


def iq4_xs(blocks: torch.Tensor) -> Scaled:
    """d, 2 bytes of high and 4 of low scale bits, nibbles: value * (d * (scale - 32)), groups of 32."""
    scales = fields(blocks[:, 4:8].unsqueeze(-1), NIBBLES, 15).view(-1, 8)
    scales |= fields(blocks[:, 2:4].unsqueeze(-1), CRUMBS, 3).mul_(16).view(-1, 8)
    scale = half(blocks, 0) * scales.view(torch.int8).sub_(32)
    return Scaled(_values(blocks[:, 8:].view(-1, 8, 16), "iq4"), scale.unsqueeze(-1))


def mxfp4(blocks: torch.Tensor) -> Scaled:
    """e, nibbles: value * 2**(e - 128). The values are those of e2m1 times 2, the scales of e8m0 divided by 2.

    OCP Microscaling Formats (MX) Specification 1.0, section 5.
    """
    return Scaled(_values(blocks[:, 1:].unsqueeze(1), "fp4"), lookup(tables.table("e8m0", blocks), blocks[:, :1]).unsqueeze(-1))


def nvfp4(blocks: torch.Tensor) -> Scaled:
    """4 scales, then 4 groups of 16 as nibbles: value * scale, the values times 2, the scales (e4m3) divided by 2."""
    scale = lookup(tables.table("ue4m3", blocks), blocks[:, :4])
    return Scaled(_values(blocks[:, 4:].view(-1, 4, 8), "fp4"), scale.unsqueeze(-1))
