"""The blocks of a model: modules in its lists that hold most of its weight, each of which lies with one worker."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from ....files.parameters import size
from ..tokens import Unsuited

# The path of a module in a unit, which of its dictionaries, and the name there.
Slot = tuple[str, str, str]
Weights = dict[Slot, Any]

_LISTS = (torch.nn.ModuleList,)
_CHAINS = (torch.nn.Sequential,)  # some models call their members, and not the chain itself
_MOST = 0.5  # of a weight
_LITTLE = 0.1  # of the blocks' weight, which every rank can hold beside its share


class Unit:
    """A block.

    Attributes:
        name: in the model.
        bytes: of its parameters and buffers, in whatever format they have.
    """

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name, self.module = name, module
        self.bytes = weight_of(module)

    def weights(self) -> Weights:
        """All tensors of its modules: parameters, buffers, and whatever else a layer keeps as an attribute."""
        return {(path, place, leaf): value for path, module in self.module.named_modules()
                for place in ("_parameters", "_buffers", "") for leaf, value in _space(module, place).items()
                if isinstance(value, torch.Tensor)}

    def lay(self, weights: Mapping[Slot, Any]) -> dict[Slot, Any]:
        """It computes with these from now on; None is for those that it shall not have. Returns what it had instead."""
        before: dict[Slot, Any] = {}
        for slot, value in weights.items():
            path, place, leaf = slot
            space = _space(self.module.get_submodule(path), place)
            before[slot] = space.get(leaf)
            space[leaf] = value
        return before


def _space(module: torch.nn.Module, place: str) -> dict[str, Any]:
    space: dict[str, Any] = vars(module)
    return space[place] if place else space


def weight_of(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, in the format that they have."""
    return sum(map(size, [*module.parameters(), *module.buffers()]))


def units_of(model: torch.nn.Module) -> list[Unit]:
    """A diffusion model's, in the order in which it defines them.

    Raises:
        Unsuited: it has no lists of modules that hold most of its weight.
    """
    units = [Unit(name, module) for name, module in _blocks(model, "", listed=False)]
    units = [unit for unit in units if unit.bytes]
    held = sum(unit.bytes for unit in units)
    if not held or held < _MOST * weight_of(model):
        raise Unsuited(f"{type(model).__name__} has no lists of blocks that hold most of its weight")
    return units


def long_lists(units: Sequence[Unit]) -> list[Unit]:
    """Those in the parts of the model that hold most of the weight; the others hold little, all together."""
    held: Counter[str] = Counter()
    for unit in units:
        held[_part(unit)] += unit.bytes
    short, left = set(), _LITTLE * held.total()
    for part, weight in reversed(held.most_common()):
        left -= weight
        if left < 0:
            break
        short.add(part)
    return [unit for unit in units if _part(unit) not in short]


def _part(unit: Unit) -> str:
    return unit.name.partition(".")[0]


def _blocks(module: torch.nn.Module, name: str, listed: bool) -> Iterator[tuple[str, torch.nn.Module]]:
    inner = [found for leaf, child in module.named_children()
             for found in _blocks(child, f"{name}.{leaf}".lstrip("."), isinstance(module, _LISTS)
                                  or (listed and isinstance(module, _CHAINS)))]
    is_block = listed and not isinstance(module, (*_LISTS, *_CHAINS))
    if is_block and sum(weight_of(block) for _, block in inner) <= _MOST * weight_of(module):
        inner = [(name, module)]  # what lists it has are small ones, as of an attention's outputs
    yield from inner


def by_turns(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Who owns each block: whoever has least of its share so far."""
    held = [0.0] * len(shares)
    owners = []
    for each in sizes:
        owner = min(range(len(shares)), key=lambda rank: ((held[rank] + each) / shares[rank], rank))
        held[owner] += each
        owners.append(owner)
    return owners


def in_a_row(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Who owns each block, where each has those that come one after the other."""
    ends = list(accumulate(share / sum(shares) for share in shares))
    middles = [(end - each / 2) / sum(sizes) for end, each in zip(accumulate(sizes), sizes, strict=True)]
    return [next((rank for rank, end in enumerate(ends) if middle < end), len(ends) - 1) for middle in middles]
