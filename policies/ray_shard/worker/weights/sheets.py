"""A block's tensors in one piece of memory, and a sheet that says what lies where in it.

A sheet is what a parcel is, only that every plain tensor lies in that piece: whatever a format makes of plain tensors
(quantised tensors with their scales, GGUF's blocks) is made again where it is read.
"""
from __future__ import annotations

import io
from typing import Any

import torch

from ...packing import Packer
from ...rebuilding import Unpacker
from .units import Weights

_ALIGNED = 256  # bytes; where a tensor may begin
_FLAT = "flat"


class _Sheet(Packer):
    def __init__(self) -> None:
        self._flat = object()
        super().__init__(None, {id(self._flat): _FLAT})
        self.lying: list[tuple[int, torch.Tensor]] = []  # first byte, and what lies there
        self.size = 0

    def _memory(self, tensor: torch.Tensor, weight: bool) -> tuple[Any, ...]:
        stride = torch.empty_like(tensor, device="meta").stride()
        if stride != tensor.stride():
            tensor = tensor.clone(memory_format=torch.preserve_format)
        offset = self.size
        self.lying.append((offset, tensor))
        self.size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        return self._flat, offset, tensor.dtype, tuple(tensor.shape), stride


def write(weights: Weights, device: torch.device) -> tuple[torch.Tensor, bytes]:
    """(a copy of all bytes, on this device; the sheet)."""
    sheet = _Sheet()
    sheet.dump(weights)
    flat = torch.empty(sheet.size, dtype=torch.uint8, device=device)
    for offset, tensor in sheet.lying:
        dense = tensor.detach().as_strided((tensor.numel(),), (1,))
        flat[offset:offset + tensor.nbytes].copy_(dense.view(torch.uint8))
    sheet.lying.clear()  # a pickler refers to itself: the tensors would be there until Python looks for such circles
    sheet.clear_memo()
    return flat, sheet.stream.getvalue()


def read(sheet: bytes, flat: torch.Tensor) -> Weights:
    """The tensors, over these bytes; nothing is copied."""
    found: Weights = Unpacker(io.BytesIO(sheet), [], {_FLAT: flat.untyped_storage()}).load()
    return found
