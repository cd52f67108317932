"""A model as hybrid_split sees it, without a host."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


def layers(*sizes: int) -> nn.Sequential:
    """A model of layers with so many KB of weights each."""
    made = nn.Sequential(*(nn.Linear(256, size, bias=False) for size in sizes))
    return made.requires_grad_(False)


@dataclass
class SplitWeights:
    """A model of which the host left all on RAM and casts it at use, unless a test says `loaded`."""

    module: nn.Module
    name: str = "Model"
    streamed_by_host: bool = False
    loaded: set[str] = field(default_factory=set)
    locked: set[str] = field(default_factory=set)  # by name, what the host page-locked

    def size(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def on_device(self) -> int:
        return 0

    def cast_at_use(self) -> list[tuple[str, torch.nn.Module]]:
        return [(name, leaf) for name, leaf in self.module.named_modules()
                if name not in self.loaded and leaf is not self.module]

    def pinned(self) -> set[str]:
        return self.locked

    def unpin(self, name: str) -> None:
        self.locked.remove(name)
