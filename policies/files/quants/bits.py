"""Small integers out of packed bytes, and the form that every quantised type is brought into: values, scales, offsets.

Files are little-endian, and so is every machine that torch runs on; views of bytes as wider numbers rely on it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import tables

NIBBLES = (0, 4)
CRUMBS = (0, 2, 4, 6)
BITS = (0, 1, 2, 3, 4, 5, 6, 7)


class Scaled(NamedTuple):
    """Blocks as groups of elements with a common scale: an element is `values * scale + offset`, in float32.

    values: 8-bit integers, (n, groups, elements of a group).
    scale: float32, (n, groups, 1).
    offset: float32 like `scale`, or None. A type that subtracts a minimum has the negated minimum here, which is the same
        to the last bit.
    """

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None


def whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is to be processed by few kernels on all of it (an accelerator, or a compiler that fuses them), and
    not by as many cheap passes over what fits into a processor's cache."""
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


def fields(packed: torch.Tensor, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """`(packed >> shift) & mask` for every shift.

    Args:
        packed: integers, (..., k).

    Returns:
        (..., len(shifts), k), contiguous.
    """
    if whole(packed):
        each = tables.numbers(tuple(shifts), packed).view(-1, 1)
        return torch.bitwise_right_shift(packed.unsqueeze(-2), each).bitwise_and_(mask)
    # Shifts by one number are fast, shifts by a broadcast tensor are not; nor is stepping through more than two dimensions.
    packed = packed.contiguous() if packed.ndim > 2 else packed
    result = packed.new_empty((*packed.shape[:-1], len(shifts), packed.shape[-1]))
    if shifts == NIBBLES and packed.dtype == torch.uint8:  # nothing is left of the upper half to be masked
        torch.bitwise_and(packed, 15, out=result.select(-2, 0))
        torch.bitwise_right_shift(packed, 4, out=result.select(-2, 1))
        return result
    for index, shift in enumerate(shifts):
        torch.bitwise_right_shift(packed, shift, out=result.select(-2, index))
    return result.bitwise_and_(mask)


def half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32: (n, 1)."""
    return blocks[:, start:start + 2].view(torch.float16).float()


def words(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some bytes of each block as wider integers, wherever they begin: (n, bytes / word size)."""
    # A view needs aligned bytes. clone, not contiguous: that of a single block is the block's own memory.
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The table's entries, each a number or several bytes packed into one, in the shape of the index.

    Args:
        table: (entries,), contiguous.
        index: integers from 0.
    """
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape)
