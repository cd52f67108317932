"""A rank of a group, in a process of its own, whose arguments are its rank and a port for each way to share, in their order.

Computes every family of models alone and shared, and prints JSON: by way and family, the largest error relative to the largest
number of the model alone, how many attention calls were shared, and how many there are.
"""
from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from residency.policies.ray_shard.worker import attention
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.heads import HeadParallel

from support.families import DEAF, FAMILIES

# By name: how many ranks, and their shares.
WAYS: dict[str, tuple[int, list[float] | None]] = {
    "two": (2, None),
    "three": (3, None),
    "two, unequal": (2, [0.7, 0.3]),
    "three, one idle": (3, [1, 0, 1]),
}
LONELY = "ranks that do not gather"


class Lonely:
    """A group that has nothing from the others: the result must be wrong."""

    rank, world = 0, 2

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        missing = list(tensor.shape)
        missing[dim] = sum(sizes) - sizes[0]
        return torch.cat([tensor, tensor.new_zeros(missing)], dim)


class Found:
    """The families' models, what each makes alone, and how many attentions it takes."""

    def __init__(self) -> None:
        self.families = {**FAMILIES, **DEAF}
        self.models = {name: family.model() for name, family in self.families.items()}
        self.alone = {name: self.call(name, {}) for name in self.families}
        self.attentions = {name: self._count(name) for name in self.families}

    def call(self, name: str, options: dict[str, Any]) -> torch.Tensor:
        return self.families[name].call(self.models[name], options)

    def _count(self, name: str) -> int:
        counted = HeadParallel(Lonely(), [1, 0])  # all heads are its own
        with attention.sharing(counted):
            self.call(name, {})
        return counted.shared + counted.whole

    def compare(self, name: str, parallel: HeadParallel, entry: bool) -> dict[str, float]:
        """Shared by the override; and by the entry, if wanted."""
        before = parallel.shared
        with attention.sharing(parallel) if entry else contextlib.nullcontext():
            result = self.call(name, {"optimized_attention_override": parallel.attention})
        error = (result - self.alone[name]).abs().max() / self.alone[name].abs().max()
        return {"error": error.item(), "shared": parallel.shared - before, "calls": self.attentions[name]}


def found_by(rank: int, ports: list[int]) -> dict[str, dict[str, Any]]:
    """By way, by family."""
    attention.install()
    found, results = Found(), {}
    addresses = [f"127.0.0.1:{port}" for port in ports]
    for (way, (world, shares)), address in zip({**WAYS, LONELY: (0, None)}.items(), [*addresses, ""], strict=True):
        if world and rank >= world:
            continue
        group = Group(rank, world, address) if world else Lonely()
        parallel = HeadParallel(group, shares)
        results[way] = {name: found.compare(name, parallel, entry=False) for name in found.families}
        results[way] |= {f"{name} by the entry": found.compare(name, parallel, entry=True) for name in ("flux", *DEAF)}
        if isinstance(group, Group):
            results[way]["sent"] = {"collectives": group.collectives, "bytes": group.sent}
            group.close()
    return results


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with torch.inference_mode():
        print(json.dumps(found_by(int(sys.argv[1]), [int(port) for port in sys.argv[2:]])))
