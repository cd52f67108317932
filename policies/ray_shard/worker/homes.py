"""Where weights are kept while ComfyUI moves them, and how they come back without a copy."""
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class Home:
    """Where a layer's weight lies when nothing is computed: in a file's mapping, or in what the host sent.

    ComfyUI moves a weight by giving its parameter other memory. What is kept here is another parameter over the first.
    """

    def __init__(self, layer: torch.nn.Module, leaf: str) -> None:
        self._layer, self._leaf = layer, leaf
        lent: Any = layer._parameters[leaf]
        self._kept = _over(lent)
        self._lent: Callable[[], Any] = weakref.ref(lent)  # it may be given memory on a device, which ends with its use

    def leave(self) -> None:
        """Gives the weight memory of its own: hooks write to it in place, and others see what is here."""
        here: Any = self._layer._parameters[self._leaf]
        if here is self._lent() and here.device == self._kept.device:
            self._layer._parameters[self._leaf] = torch.nn.Parameter(self._kept.clone(), requires_grad=False)

    def come_back(self) -> None:
        """The weight lies here again; nothing is copied."""
        here = self._layer._parameters[self._leaf] = _over(self._kept)
        self._lent = weakref.ref(here)


def _over(weight: Any) -> torch.nn.Parameter:
    """Another parameter over the same memory."""
    made = torch.nn.Parameter(weight.detach(), requires_grad=False)
    vars(made).update({name: value for name, value in vars(weight).items() if name not in vars(made)})
    return made
