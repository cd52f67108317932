"""GGUF blocks as a layout of the host's `QuantizedTensor`.

The tensor's only part is the block bytes, so a file's mapping moves, streams and is pinned by the host like any of its own
quantised formats. It is a weight-only format: nothing is ever quantised into it, and each use dequantises it.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class

from ...policies.files import quants
from ...policies.files.gguf_rows import apart
from . import LAYOUT
from .dense import METER


@dataclass(frozen=True)
class Blocks:
    """What the block bytes stand for. It holds no tensors, so it is the same on every device and needs no copies.

    Attributes:
        kind: the number of a ggml type.
        orig_dtype: what the host takes the tensor's dtype for, and what it dequantises to.
        orig_shape: of the weights, not of the bytes.
        heads: of attention, where llama.cpp interleaved the rows of each; None where they are in order.
    """

    kind: int
    orig_dtype: torch.dtype
    orig_shape: tuple[int, ...]
    heads: int | None = None

    def to_device(self, device: torch.device) -> Blocks:
        return self

    def clone(self) -> Blocks:
        return self

    def copy_from(self, source: Blocks, non_blocking: bool = False) -> None:
        """Nothing to copy: bytes are only ever copied between tensors of one shape and type."""


class Layout(QuantizedLayout):  # type: ignore[misc]  # the host's packages have no types
    """Block bytes in the file's order."""

    Params = Blocks

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Blocks]:
        raise NotImplementedError("GGUF weights are read, never made")

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Blocks) -> torch.Tensor:
        return dense(qdata, params, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, tensor: Any) -> tuple[torch.Tensor, ...]:
        return (tensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Blocks) -> Mapping[str, torch.Tensor]:
        return {"": cls.dequantize(qdata, params)}  # whoever saves it wants weights that others can read


register_layout_class(LAYOUT, Layout)  # where a tensor arrives from another process, this module is imported, and no more


def dense(blocks: torch.Tensor, params: Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The weights in this dtype. A compiler sees torch's own operations here, and cannot look into `dequantize` of a tensor."""
    compiling = torch.compiler.is_compiling()
    mark = None if compiling else METER.start(blocks.device)
    made = quants.dequantize(blocks, params.kind, params.orig_shape, dtype)
    if not compiling:
        METER.stop(mark, made.nbytes)
    return made if params.heads is None else apart(made, params.heads)


def wrap(blocks: torch.Tensor, kind: int, shape: tuple[int, ...], heads: int | None = None) -> torch.Tensor:
    """The weights that a tensor of block bytes stands for. Float32 until a module says what it computes in."""
    wrapped: torch.Tensor = QuantizedTensor(blocks, LAYOUT, Blocks(kind, torch.float32, shape, heads))
    return wrapped


def typed(blocks: Any, dtype: torch.dtype) -> torch.Tensor:
    """The same blocks, taken by the host for another dtype. `to` would copy them outside of inference mode."""
    wrapped: torch.Tensor = QuantizedTensor(blocks._qdata, LAYOUT, replace(blocks._params, orig_dtype=dtype))
    return wrapped
