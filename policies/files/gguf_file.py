"""A GGUF file's tensors over one mapping, in the interface of a `safetensors` handle.

Numbers come as typed tensors; quantised ones as their block bytes, of shape (rows, bytes of a row).
"""
from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch

from . import gguf_header, quants
from .gguf_header import TensorInfo

# Types that torch has, by ggml's numbers.
PLAIN = {0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
         28: torch.float64, 30: torch.bfloat16}
# Where a converter folded a tensor so that its rows fill whole blocks, it kept the shape under this key.
_SHAPE = "comfy.gguf.orig_shape."


class GGUFFile:
    """The mapping is private (copy on write), and lives as long as this or any of its tensors.

    Raises:
        gguf_header.GGUFError: it is no GGUF file, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.header = gguf_header.of(path)
        # Before anything is mapped: a mapping that fails half way locks the file on Windows.
        for info in self.header.tensors.values():
            if info.kind not in PLAIN and info.kind not in quants.KINDS:
                raise gguf_header.GGUFError(f"{path}: tensor {info.name} has the type {info.kind}, which cannot be dequantised"
                                            ". Take the file in another quantisation")
        with open(path, "rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def keys(self) -> Iterable[str]:
        return self.header.tensors.keys()

    def metadata(self) -> dict[str, str]:
        """The texts among the key-value pairs, which is what a safetensors file could hold."""
        return {key: value for key, value in self.header.kv.items() if isinstance(value, str)}

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor with a storage of its own, which keeps the mapping."""
        info = self.header.tensors[name]
        dtype = PLAIN.get(info.kind, torch.uint8)
        if not info.size:
            return torch.empty(self.shape(name), dtype=dtype)
        shape = self.shape(name) if info.kind in PLAIN else (math.prod(info.shape[:-1]), -1)
        return torch.frombuffer(self._mapping, dtype=dtype, count=info.size // dtype.itemsize, offset=info.offset).view(shape)

    def offset(self, name: str) -> int:
        """Where in the file a tensor's bytes begin."""
        return self.header.tensors[name].offset

    def kind(self, name: str) -> int:
        return self.header.tensors[name].kind

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weights, in torch's order.

        Raises:
            gguf_header.GGUFError: the file says a shape that its weights cannot have.
        """
        info: TensorInfo = self.header.tensors[name]
        kept = self.header.kv.get(_SHAPE + name)
        if kept is None:
            return info.shape
        try:
            shape = tuple(int(size) for size in kept)
        except (TypeError, ValueError):  # a number, or texts
            shape = ()
        if not shape or min(shape) < 1 or math.prod(shape) != math.prod(info.shape):
            raise gguf_header.GGUFError(f"{self.header.path}: tensor {name} has the shape {info.shape}, and {shape} under "
                                        f"{_SHAPE}")
        return shape
