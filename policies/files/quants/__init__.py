"""GGUF's tensor types in plain torch: from a file's bytes to numbers, on the device where the bytes are.

The reference is the `gguf` package (the numpy code that llama.cpp's converters use), and float32 results equal its results
bit for bit. Every other dtype is that float32 result rounded once, so the weights are those of a file that had been
dequantised to this dtype before. An ahead-of-time or just-in-time compiler may contract a product and a sum into one
operation, which rounds once instead of twice; what is said here holds for what runs as it is written.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from . import fp4, fused, i_quants, k_quants, legacy, ternary
from .bits import Scaled, whole
from .kinds import KINDS, PLAIN, Kind, find

__all__ = ["KINDS", "Kind", "dequantize", "dequantize_rows"]

# A processor takes this many elements at once: their float32 values (8 MB) stay in its cache from pass to pass, and the
# passes are long enough that starting them costs little.
CHUNK = 2**21

_ROUNDED_BY_KERNELS = (torch.float32, torch.float16, torch.bfloat16)  # an operation's `out` may have any of these

_READERS: Mapping[str, Callable[[torch.Tensor], Scaled]] = {
    "Q4_0": legacy.q4_0, "Q4_1": legacy.q4_1, "Q5_0": legacy.q5_0, "Q5_1": legacy.q5_1, "Q8_0": legacy.q8_0,
    "Q2_K": k_quants.q2_k, "Q3_K": k_quants.q3_k, "Q4_K": k_quants.q4_k, "Q5_K": k_quants.q5_k, "Q6_K": k_quants.q6_k,
    "IQ2_XXS": i_quants.iq2_xxs, "IQ2_XS": i_quants.iq2_xs, "IQ2_S": i_quants.iq2_s, "IQ3_XXS": i_quants.iq3_xxs,
    "IQ3_S": i_quants.iq3_s, "IQ1_S": i_quants.iq1_s, "IQ1_M": i_quants.iq1_m, "IQ4_NL": fp4.iq4_nl, "IQ4_XS": fp4.iq4_xs,
    "TQ1_0": ternary.tq1_0, "TQ2_0": ternary.tq2_0, "MXFP4": fp4.mxfp4, "NVFP4": fp4.nvfp4,
}


def dequantize(raw: torch.Tensor, kind: int, shape: Sequence[int], dtype: torch.dtype,
               out: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers that a tensor's bytes stand for.

    Args:
        raw: uint8, contiguous, of any shape: all of a tensor's blocks, in row-major order.
        kind: the type's number in GGUF, one of `KINDS`.
        shape: of the result, in torch's order (rows first).
        dtype: of the result: float32, or a floating dtype that the float32 result is rounded to once.
        out: where the result goes, contiguous and with the result's number of elements; otherwise new memory.

    Returns:
        a tensor of this shape and dtype, on the device of `raw`. Nothing waits for the device, but when `fused` measures.

    Raises:
        ValueError: the type is none of `KINDS`, the dtype is not a floating one, or the bytes or `out` do not fit.
    """
    found, count = find(kind), math.prod(shape)
    if raw.dtype != torch.uint8 or not raw.is_contiguous():
        raise ValueError(f"the bytes must be contiguous uint8, and are {raw.dtype} with strides {raw.stride()}")
    if count % found.block or raw.numel() != count // found.block * found.size:
        raise ValueError(f"{raw.numel()} bytes are not a {found.name} tensor of shape {tuple(shape)}: "
                         f"it has {found.size} bytes for every {found.block} elements")
    if not dtype.is_floating_point:
        raise ValueError(f"weights are not dequantised to {dtype}")
    if out is None:
        out = raw.new_empty(shape, dtype=dtype)
    elif out.numel() != count or out.dtype != dtype or out.device != raw.device or not out.is_contiguous():
        raise ValueError(f"the result is {tuple(shape)}, {dtype}, {raw.device}, which the given memory is not: "
                         f"{tuple(out.shape)}, {out.dtype}, {out.device}, strides {out.stride()}")
    if count:
        # torch reads no words from a view that begins in the middle of one; a compiler does not know where it begins.
        if not torch.compiler.is_compiling() and raw.storage_offset() % 4:
            raw = raw.clone()
        values, blocks = out.view(-1, found.block), raw.view(-1, found.size)
        fill = fused.kernel_for(blocks, found, values, _fill) or _fill
        fill(values, blocks, found)
    return out.view(tuple(shape))


def dequantize_rows(raw: torch.Tensor, kind: int, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a matrix, as an embedding looks them up; the others' bytes are not touched.

    Args:
        raw: uint8, (rows, bytes of a row), contiguous.
        kind: as for `dequantize`.
        index: integers from 0, of any shape, on the device of `raw`.
        dtype: as for `dequantize`.

    Returns:
        index.shape + (elements of a row,), in this dtype.

    Raises:
        ValueError: the type is none of `KINDS`, or `raw` is not made of rows of whole blocks.
    """
    found = find(kind)
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.shape[1] % found.size:
        raise ValueError(f"{tuple(raw.shape)}, {raw.dtype}: not rows of {found.name} blocks of {found.size} bytes")
    index = index if index.dtype in (torch.int32, torch.int64) else index.long()
    elements = raw.shape[1] // found.size * found.block
    return dequantize(raw.index_select(0, index.reshape(-1)), kind, (*index.shape, elements), dtype)


def _fill(out: torch.Tensor, blocks: torch.Tensor, kind: Kind) -> None:
    """Writes the numbers of all blocks.

    Args:
        out: (n, elements of a block), contiguous.
        blocks: uint8, (n, bytes of a block), contiguous.
    """
    plain = PLAIN.get(kind.number)
    if plain is not None and (plain == out.dtype or torch.float32 in (plain, out.dtype)):
        out.copy_(blocks.view(plain))
        return
    if whole(blocks):
        _write(out, blocks, kind)
        return
    step = CHUNK // kind.block
    scratch = out.new_empty((min(step, len(out)), kind.block), dtype=torch.float32)
    for start in range(0, len(blocks), step):
        part = out[start:start + step]
        values = part if part.dtype == torch.float32 else scratch[:len(part)]
        _pass_by_pass(values, blocks[start:start + step], kind)
        if values is not part:
            part.copy_(values)


def _write(out: torch.Tensor, blocks: torch.Tensor, kind: Kind) -> None:
    """Few kernels: the last one computes in float32 and rounds as it writes."""
    if kind.number in PLAIN:
        out.copy_(blocks.view(PLAIN[kind.number]).float())
        return
    values, scale, offset = _READERS[kind.name](blocks)
    if torch.compiler.is_compiling() or out.dtype not in _ROUNDED_BY_KERNELS:
        result = values * scale if offset is None else values * scale + offset
        out.copy_(result.view(out.shape))
    elif offset is None:
        torch.mul(values, scale, out=out.view(values.shape))
    else:
        torch.add(values * scale, offset, out=out.view(values.shape))


def _pass_by_pass(out: torch.Tensor, blocks: torch.Tensor, kind: Kind) -> None:
    """One operation after the other in the same memory, float32: each of them is vectorised, and mixed ones are not."""
    if kind.number in PLAIN:
        out.copy_(blocks.view(PLAIN[kind.number]))
        return
    values, scale, offset = _READERS[kind.name](blocks)
    out = out.view(values.shape)
    out.copy_(values).mul_(scale)
    if offset is not None:
        out.add_(offset)
