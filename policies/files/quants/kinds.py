"""The types of tensors in a GGUF file: their numbers, and how their bytes make blocks.

The numbers are `enum ggml_type` of ggml.h; blocks and sizes are what `gguf.constants.GGML_QUANT_SIZES` says.
"""
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch


class Kind(NamedTuple):
    """A type: every `block` consecutive elements of a row are `size` bytes of the file."""

    name: str
    number: int
    block: int
    size: int


KINDS: Mapping[int, Kind] = MappingProxyType({kind.number: kind for kind in (
    Kind("F32", 0, 1, 4), Kind("F16", 1, 1, 2), Kind("BF16", 30, 1, 2),
    Kind("Q4_0", 2, 32, 18), Kind("Q4_1", 3, 32, 20), Kind("Q5_0", 6, 32, 22), Kind("Q5_1", 7, 32, 24), Kind("Q8_0", 8, 32, 34),
    Kind("Q2_K", 10, 256, 84), Kind("Q3_K", 11, 256, 110), Kind("Q4_K", 12, 256, 144), Kind("Q5_K", 13, 256, 176),
    Kind("Q6_K", 14, 256, 210),
    Kind("IQ2_XXS", 16, 256, 66), Kind("IQ2_XS", 17, 256, 74), Kind("IQ2_S", 22, 256, 82),
    Kind("IQ3_XXS", 18, 256, 98), Kind("IQ3_S", 21, 256, 110), Kind("IQ1_S", 19, 256, 50), Kind("IQ1_M", 29, 256, 56),
    Kind("IQ4_NL", 20, 32, 18), Kind("IQ4_XS", 23, 256, 136),
    Kind("TQ1_0", 34, 256, 54), Kind("TQ2_0", 35, 256, 66),
    Kind("MXFP4", 39, 32, 17), Kind("NVFP4", 40, 64, 36),
)})

# The types that are not quantised, as torch has them.
PLAIN: Mapping[int, torch.dtype] = MappingProxyType({0: torch.float32, 1: torch.float16, 30: torch.bfloat16})


def find(number: int) -> Kind:
    """The type with this number.

    Raises:
        ValueError: it is none of `KINDS`.
    """
    kind = KINDS.get(number)
    if kind is None:
        raise ValueError(f"GGUF tensors of type {_name(number)} cannot be dequantised")
    return kind


def _name(number: int) -> str:
    try:
        from gguf.constants import GGMLQuantizationType
        return f"{GGMLQuantizationType(number).name} ({number})"
    except (ImportError, ValueError):
        return f"number {number}"
