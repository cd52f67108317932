"""What the modes have in common in which each block of a model lies with one worker: who owns it, and that all are ready."""
from __future__ import annotations

import abc
import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from comfy.model_management import soft_empty_cache
from comfy.patcher_extension import CallbacksMP

from ..group import Group
from ..tokens import Unsuited
from .units import Unit, Weights, units_of, weight_of

_OURS = "residency"
Predict = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class Owned(abc.ABC):
    """A model whose blocks are shared out among the ranks of a group.

    Args:
        shares: of the weights, one for each rank, in any unit.

    Attributes:
        owners: the rank of each block; -1 if no rank has all of it.
        last_answers: only the last rank has the prediction; else all have.
    """

    last_answers = False

    def __init__(self, group: Group, shares: Sequence[float]) -> None:
        self.group, self._shares = group, shares
        self.units: list[Unit] = []
        self.owners: list[int] = []
        self._model: Any = None
        self._patcher: Any = None
        self._away: dict[int, Weights] = {}  # by block: its tensors in the file's mapping, while it is not here
        self._news = b""  # for the other ranks

    def place(self, patcher: Any, load: Callable[[int], None]) -> None:
        """Places this rank's blocks, and all that is in none.

        Args:
            load: has ComfyUI place a model, beside so many bytes; it sees no other blocks.

        Raises:
            Unsuited: this model, or what is patched, cannot be shared out so; all ranks find it alike.
        """
        model, self._patcher = patcher.model.diffusion_model, patcher
        self.units = self._units(model)
        self._refuse(patcher)
        self.owners = self._owners([unit.bytes for unit in self.units], self._shares)
        with self._absent(model):
            patcher.size = 0  # of what it sees now
            load(self._beside())
        self._model = patcher.model
        patcher.partially_unload = _all_or_nothing  # a part of a block's bytes cannot go
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _OURS, lambda *_: self._taken_off())
        crowded = f"worker {self.group.rank} has no room for its part of the weights"
        self._news = pickle.dumps(crowded if getattr(patcher.model, "model_lowvram", False) else self._placed())
        soft_empty_cache()  # what weights lay in before is as large as what they lie in now

    def drop(self) -> None:
        """Everything is the file's mapping again, but for what ComfyUI has placed, which it takes back itself."""
        for index, weights in self._away.items():
            self.units[index].lay(weights)
        self._away.clear()
        if self._patcher is not None:
            self._patcher.size = 0
            vars(self._patcher).pop("partially_unload", None)
            self._patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, _OURS)
        self._taken_off()
        self._patcher = self._model = None

    def run(self, predict: Predict, x: torch.Tensor, arguments: dict[str, Any], apart: bool) -> torch.Tensor:
        """A prediction, by all ranks together.

        Args:
            apart: its rows may be predicted one after the other.

        Raises:
            Unsuited: it cannot be computed so; all ranks find it alike.
            PeerLost: another rank did not take part.
        """
        through_ram = self.group.place(x.device) != x.device
        self._agree()
        try:
            return self._run(predict, x, arguments, apart)
        finally:
            if through_ram:  # what came is kept by its allocator
                soft_empty_cache()

    def bytes_here(self) -> int:
        """Of the weights that lie with this rank."""
        return weight_of(self._model)

    def _units(self, model: torch.nn.Module) -> list[Unit]:
        """The blocks that are shared out."""
        return units_of(model)

    @abc.abstractmethod
    def _owners(self, sizes: Sequence[int], shares: Sequence[float]) -> list[int]: ...

    def _beside(self) -> int:
        """Bytes of weights that ComfyUI does not place itself."""
        return 0

    @abc.abstractmethod
    def _placed(self) -> Any:
        """After ComfyUI has placed what is this rank's; what the others are told of it: a string is why it cannot be."""

    @abc.abstractmethod
    def _taken_off(self) -> None:
        """ComfyUI has taken the model off the device."""

    @abc.abstractmethod
    def _told(self, rank: int, news: Any) -> None:
        """What another rank has placed."""

    @abc.abstractmethod
    def _run(self, predict: Predict, x: torch.Tensor, arguments: dict[str, Any], apart: bool) -> torch.Tensor: ...

    def _refuse(self, patcher: Any) -> None:
        names = tuple(f"diffusion_model.{unit.name}." for unit in self.units)
        inside = sorted(name for name in (*patcher.object_patches, *patcher.weight_wrapper_patches) if name.startswith(names))
        if inside:
            raise Unsuited(f"{inside[0]} is replaced, in a block that not every worker has")
        if patcher.hook_patches:
            raise Unsuited("LoRA that hooks schedule are not applied to blocks that not every worker has")
        if getattr(patcher, "force_cast_weights", False):
            raise Unsuited("weights are cast to another dtype than the model's own")

    @contextlib.contextmanager
    def _absent(self, model: torch.nn.Module) -> Iterator[None]:
        """Blocks of other ranks are not in the model, and afterwards have no weights."""
        others = [index for index, owner in enumerate(self.owners) if owner != self.group.rank]
        for index in others:
            _put(model, self.units[index].name, torch.nn.Module())
        try:
            yield
        finally:
            for index in others:
                _put(model, self.units[index].name, self.units[index].module)
        for index in others:
            for key in self._patched_in(self.units[index]):
                self._patcher.patch_at_use(key)  # what travels as it is in the file is patched by whoever computes it
            weights = self._away[index] = self.units[index].weights()
            self.units[index].lay(dict.fromkeys(weights))  # whoever uses one nevertheless hears of it

    def _patched_in(self, unit: Unit) -> list[str]:
        """The patcher's keys of a block's parameters that it patches."""
        keys = (f"diffusion_model.{unit.name}.{name}" for name, _ in unit.module.named_parameters(remove_duplicate=False))
        return [key for key in keys if key in self._patcher.patches]

    def _agree(self) -> None:
        """What is new with any rank is known to all."""
        mine, self._news = self._news, b""
        failures = []
        for rank, news in enumerate(everyone(self.group, mine)):
            if news and isinstance(found := pickle.loads(news), str):
                failures.append(found)
            elif news:
                self._told(rank, found)
        if failures:
            self._news = mine
            raise Unsuited("; ".join(failures))


def _all_or_nothing(*args: Any, **kwargs: Any) -> int:
    """How many bytes it gave back."""
    return 0


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def everyone(group: Group, mine: bytes) -> list[bytes]:
    """What every rank has to say, in the order of ranks."""
    lengths = group.gather(torch.tensor([len(mine)]), 0, [1] * group.world).tolist()
    if not any(lengths):
        return [b""] * group.world
    said = group.gather(torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[:len(mine)], 0, lengths)
    return [part.numpy().tobytes() for part in torch.split(said, lengths)]
