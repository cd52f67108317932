"""Q8_0, Q4_K, Q5_K and Q6_K in Triton: one kernel from the bytes to the result. Importing this imports Triton.

The formats and the order of the operations are those of `legacy` and `k_quants`. Every product here is exact in float32: a
float16 has 11 significant bits, a scale at most 7 and a value at most 7, or 5 where there is a scale too. So it makes no
difference whether a compiler contracts a product and a difference into one operation (ptxas does for Blackwell, although it
is told not to), nor whether a device flushes float32's subnormal numbers, of which there are none.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .kinds import Kind

# Of one program; 32 for each thread of its four warps, so that a group's scale is not computed by every thread that needs it.
ELEMENTS = 4096
OPTIONS: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def launch(out: torch.Tensor, blocks: torch.Tensor, kind: Kind) -> None:
    """Writes the numbers of all blocks. Nothing waits for the device.

    Args:
        out: (n, elements of a block), contiguous, float32, float16 or bfloat16.
        blocks: uint8, (n, bytes of a block), contiguous; they may begin anywhere in memory.
        kind: one of `KERNELS`.
    """
    tile = ELEMENTS // kind.block
    to = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
    with torch.cuda.device_of(out):  # Triton launches on the current device, wherever the tensors are
        KERNELS[kind.name][(triton.cdiv(len(blocks), tile),)](blocks, to, len(blocks), TILE=tile, **OPTIONS)


@triton.jit(do_not_specialize=["count"])
def q8_0(raw, out, count, TILE: tl.constexpr):
    """d, signed bytes: q * d."""
    block, _, to, inside = _groups(raw, out, count, TILE, 34, 32, 32)
    scale = _half(block, inside)
    q = _bytes(block + 2, 32, inside).to(tl.int8, bitcast=True)
    _store(to, q.to(tl.float32) * scale[:, None], inside)


@triton.jit(do_not_specialize=["count"])
def q4_k(raw, out, count, TILE: tl.constexpr):
    """d, dmin, 12 bytes of scales and minima, nibbles: q * (d * scale) - dmin * minimum, groups of 32."""
    block, group, to, inside = _groups(raw, out, count, TILE, 144, 256, 32)
    scale, minimum = _scales(block, group, inside)
    q = _bytes(block + 16 + group // 2 * 32, 32, inside) >> (group % 2 * 4)[:, None] & 15
    _store(to, q.to(tl.float32) * scale[:, None] - minimum[:, None], inside)


@triton.jit(do_not_specialize=["count"])
def q5_k(raw, out, count, TILE: tl.constexpr):
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i of byte j is element j of group i."""
    block, group, to, inside = _groups(raw, out, count, TILE, 176, 256, 32)
    scale, minimum = _scales(block, group, inside)
    q = _bytes(block + 48 + group // 2 * 32, 32, inside) >> (group % 2 * 4)[:, None] & 15
    q |= (_bytes(block + 16, 32, inside) >> group[:, None] & 1) << 4
    _store(to, q.to(tl.float32) * scale[:, None] - minimum[:, None], inside)


@triton.jit(do_not_specialize=["count"])
def q6_k(raw, out, count, TILE: tl.constexpr):
    """128 bytes of nibbles, 64 of two high bits, 16 signed scales, d: (q - 32) * (d * scale), groups of 16.

    A half of the block is 64 bytes of nibbles, the low ones first, and 32 bytes of four high bit pairs each.
    """
    block, group, to, inside = _groups(raw, out, count, TILE, 210, 256, 16)
    scale = _half(block + 208, inside) * tl.load(block + 192 + group, inside, 0).to(tl.int8, bitcast=True).to(tl.float32)
    half, part = group // 8, group % 8
    low = _bytes(block + half * 64 + part % 4 * 16, 16, inside) >> (part // 4 * 4)[:, None] & 15
    high = _bytes(block + 128 + half * 32 + part % 2 * 16, 16, inside) >> (part // 2 * 2)[:, None] & 3
    _store(to, ((low | high << 4) - 32).to(tl.float32) * scale[:, None], inside)


@triton.jit
def _groups(raw, out, count, TILE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The groups with a scale of their own in this program's `TILE` of the `count` blocks.

    Returns:
        (groups,): where each group's block begins, and the group's number in it.
        (groups, elements of a group): where the results go.
        (groups,): whether the block exists.
    """
    first = tl.program_id(0).to(tl.int64) * TILE  # of what is counted from here 32 bits are enough
    row = tl.arange(0, TILE * (BLOCK // GROUP))
    block = row // (BLOCK // GROUP)
    to = out + first * BLOCK + (row[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
    return raw + first * SIZE + block * SIZE, row % (BLOCK // GROUP), to, block < count - first


@triton.jit
def _bytes(start, COUNT: tl.constexpr, inside):
    """(groups, COUNT): that many bytes from each `start`."""
    return tl.load(start[:, None] + tl.arange(0, COUNT)[None, :], inside[:, None], 0)


@triton.jit
def _half(start, inside):
    """The float16 at each `start`, as float32. Its two bytes may lie anywhere."""
    low, high = tl.load(start, inside, 0).to(tl.uint16), tl.load(start + 1, inside, 0).to(tl.uint16)
    return (high << 8 | low).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scales(block, group, inside):
    """d * scale and dmin * minimum of each group, from the 16 bytes that Q4_K and Q5_K begin with: see `k_quants`."""
    packed = block + 4 + group % 4
    scale, minimum = tl.load(packed, inside, 0), tl.load(packed + 4, inside, 0)
    low = tl.load(packed + 8, inside, 0)
    scale = tl.where(group < 4, scale & 63, low & 15 | scale >> 2 & 48)
    minimum = tl.where(group < 4, minimum & 63, low >> 4 | minimum >> 2 & 48)
    return _half(block, inside) * scale.to(tl.float32), _half(block + 2, inside) * minimum.to(tl.float32)


@triton.jit
def _store(to, value, inside):
    """Float32 rounded once, to the nearest and to even. Memory of 16-bit integers gets the bits of bfloat16: older cards
    have no instruction for it, and Triton's interpreter rounds it otherwise."""
    if to.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        tl.store(to, tl.where(value == value, rounded, 0x7FC0).to(tl.int16), inside[:, None])
    else:
        tl.store(to, value.to(to.dtype.element_ty), inside[:, None])


KERNELS: Mapping[str, Any] = {"Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
