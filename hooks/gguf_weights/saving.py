"""What a layer over GGUF weights gives whoever saves the model: dense weights, made when they are written to the file.

`state_dict` is asked for all the time (for sizes, for names), so its values stay blocks. The writers of files read a tensor's
memory, and would read past the blocks' end; what is not on the CPU they move there first.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor


class Saved(QuantizedTensor):  # type: ignore[misc]  # the host's packages have no types
    """Blocks that become the layer's weight on their way to the CPU, as the host's `LazyCastingParam` does."""

    weight: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, blocks: Any, weight: Callable[[], torch.Tensor]) -> Saved:
        saved = cls(blocks._qdata, blocks._layout_cls, blocks._params)
        saved.weight = weight
        return saved

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def detach(self) -> Saved:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Saved:
        return self  # the host wraps what it saves in a Parameter

    def to(self, *args: Any, **options: Any) -> torch.Tensor:
        moved: torch.Tensor = self.weight().to(*args, **options)
        return moved
