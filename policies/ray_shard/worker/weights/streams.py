"""What goes from block to block of a model: found by looking at what blocks are given, and what they make."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tokens import Unsuited

Arguments = dict[str, Any]
# Of a tensor among the arguments of a block: the argument's name, and its place there if that is a sequence.
Place = tuple[str, int | None]


def tensors_of(arguments: Arguments) -> dict[Place, torch.Tensor]:
    """Those among the arguments, and in tuples and lists among them."""
    found: dict[Place, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found[name, None] = value
        elif type(value) in (tuple, list):
            found |= {(name, place): one for place, one in enumerate(value) if isinstance(one, torch.Tensor)}
    return found


def put(arguments: Arguments, place: Place, tensor: torch.Tensor) -> None:
    name, index = place
    if index is None:
        arguments[name] = tensor
    else:
        several = list(arguments[name])
        several[index] = tensor
        arguments[name] = type(arguments[name])(several)


def shapes_of(value: Any) -> Any:
    """Of all tensors in a prediction's arguments; something that can be looked up by."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((str(name), shapes_of(one)) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(shapes_of, value))
    return value if isinstance(value, (bool, int, str)) else type(value).__qualname__


@dataclass(frozen=True)
class Recipe:
    """What a block makes: one tensor, or several of which some may be None; of each the shape and the dtype."""

    several: type | None
    tensors: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]

    @staticmethod
    def of(arguments: Arguments, made: Any) -> Recipe | str:
        """Of a block that made this; or why it is not one whose streams go on to the next block."""
        several = type(made) if type(made) in (tuple, list) else None
        parts: Sequence[Any] = made if several is not None else (made,)
        if not all(part is None or isinstance(part, torch.Tensor) for part in parts) or all(part is None for part in parts):
            return f"a block makes {type(made).__name__}, and not tensors alone"
        given = {tuple(tensor.shape) for tensor in tensors_of(arguments).values()}
        for part in parts:
            if part is not None and tuple(part.shape) not in given:
                return f"a block makes {tuple(part.shape)} of {sorted(given)}: what goes from block to block is not clear"
        return Recipe(several, tuple(None if part is None else (tuple(part.shape), part.dtype) for part in parts))

    def imitate(self, device: torch.device) -> Any:
        """Something of that shape."""
        parts = [None if one is None else torch.zeros(one[0], dtype=one[1], device=device) for one in self.tensors]
        return parts[0] if self.several is None else self.several(parts)


class Stage:
    """One forward of a model, of which this rank computes its own blocks. What it finds, it finds alike on all ranks.

    Args:
        owners: the rank of each block.
        recipes: of each block; None if they are to be learned.

    Attributes:
        at: how many blocks were computed.
    """

    def __init__(self, owners: Sequence[int], recipes: list[Recipe] | None) -> None:
        self._owners = owners
        self.learns = recipes is None
        self.recipes: list[Recipe] = [] if recipes is None else recipes
        self.at = 0
        # What blocks were given or made, by id, and who made it. None is kept: all blocks' hidden states are more than a share
        # of the weights. An id may be another's afterwards, which `_met_before` finds out.
        self._met: dict[int, tuple[Callable[[], torch.Tensor | None], int | None]] = {}

    def enter(self, index: int, arguments: Arguments) -> list[Place]:
        """Begins a block. What is to be handed over before, if it is the first of another rank.

        Raises:
            Unsuited: it is not its turn, or it takes what its rank does not have.
        """
        if index != self.at:
            raise Unsuited(f"block {index} is computed as number {self.at}")
        here = tensors_of(arguments)
        before = self._owners[index - 1] if index else self._owners[index]
        met = {place: self._met_before(tensor) for place, tensor in here.items()}
        for one in met.values():
            if one is not None and one[1] not in (None, before):
                raise Unsuited(f"block {index} takes what another than the one before it made")
        handed = []
        if before != self._owners[index]:
            handed = [place for place, one in met.items() if one is None or one[1] is not None]
            if not handed:
                raise Unsuited(f"block {index} takes nothing from those before it")
        self._met |= {id(here[place]): (weakref.ref(here[place]), None) for place, one in met.items() if one is None}
        return handed

    def leave(self, made: Any) -> None:
        """Ends a block, which made this."""
        for part in made if type(made) in (tuple, list) else (made,):
            if part is not None:
                self._met[id(part)] = weakref.ref(part), self._owners[self.at]
        self.at += 1

    def _met_before(self, tensor: torch.Tensor) -> tuple[Callable[[], torch.Tensor | None], int | None] | None:
        found = self._met.get(id(tensor))
        return found if found is not None and found[0]() is tensor else None
