"""A model's parameters, as policies see them. `hooks/weights.py` answers for ComfyUI's patchers."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class DenseRoom(Protocol):
    """How many bytes of dense weights the layers of one model keep on its device.

    Attributes:
        held: bytes that they keep now.
    """

    @property
    def device(self) -> str: ...

    @property
    def held(self) -> int: ...

    def resize(self, size: int) -> None:
        """Sets how many bytes they may keep; if they keep more, all of them go."""


class Weights(Protocol):
    """A model's parameters, as policies see them."""

    @property
    def name(self) -> str:
        """The model's class, as ComfyUI's log calls it."""

    @property
    def module(self) -> torch.nn.Module:
        """The torch module that holds the parameters; shared by all clones."""

    @property
    def streamed_by_host(self) -> bool:
        """The host keeps these weights in its own mapping (dynamic VRAM): nothing to move."""

    def restored_by_host(self) -> set[str]:
        """Names whose original the host holds itself and will put back (LoRA and hook backups)."""

    def patched(self) -> set[str]:
        """Names that a LoRA, a merge or a hook will change."""

    def give_back(self, size: float) -> int:
        """While the model is in use the host takes weights of about `size` bytes off the device, and streams them from then on.

        The numbers that it computes with stay the same, LoRA included. Returns the bytes; 0 where the model cannot stream.
        """

    def place_anew(self) -> None:
        """The next placing undoes all LoRA and starts with nothing on the device: some weights off it are patched now."""

    def load_device(self) -> str:
        """The device that the model runs on."""

    def size(self) -> int:
        """Bytes of all weights."""

    def on_device(self) -> int:
        """Bytes that the host counts as loaded on the device."""

    def cast_at_use(self) -> list[tuple[str, torch.nn.Module]]:
        """The leaf modules that the host did not load and casts at each use, by name, in the order in which the model has them.

        They stay in RAM until somebody moves them; wherever that is, the host's cast finds them.
        """

    def pinned(self) -> set[str]:
        """Names of the weights that the host page-locked."""

    def unpin(self, name: str) -> None:
        """The host lets go of a page-locked weight."""

    def end_patches(self) -> None:
        """Layers that patch their weights at each use stop doing so."""

    def dense_room(self) -> DenseRoom | None:
        """What layers over GGUF blocks may keep dense; None for a model without such layers, or one that the host streams."""

    def drop_dense(self) -> None:
        """Layers over GGUF blocks let go of dense weights."""

    @property
    def component(self) -> str:
        """As `models.Part.component`."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that it was loaded from; none where nobody saw that."""

    def by_device(self) -> Mapping[str, int]:
        """Where the bytes of the weights are, counted at the tensors themselves."""

    def foreseen(self, more: float, split: bool = False) -> int:
        """Bytes that will be on the device once the host was given so many bytes beside those that are there.

        Args:
            split: the host does not load all of it at once (`MoveWeights.whole`).
        """

    def left_over(self, more: float, split: bool = False) -> int:
        """Bytes that would then be there although the host counts them as streamed."""

    def more_for(self, limit: int) -> float:
        """What to give the host so that as much as possible of `limit` bytes is on the device, and not one byte above.

        That is with the room for its buffer, which may be more than the model's size: keep it from loading all of it then.
        """

    def take_off(self) -> None:
        """Takes all weights off the device, so that the host loads them anew."""

    def cap(self, limit: int) -> bool:
        """Of weights that the host streams itself, keeps at most so many bytes on the device until they are placed again.

        Asked after the host has placed them. Whether it can do that.
        """

    def keep_mapping(self) -> None:
        """A pack that copies what is not on the device out of its file's mapping need not, from now on."""
