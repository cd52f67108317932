"""Blocks that are away from their model's device, and how they go there and come back."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch

from ..files.bank import Bank
from ..files.parameters import Homes, fingerprints, put
from .allocation import RAM
from .blocks import place_of

Block = tuple[str, torch.nn.Module]  # by its name in the model


class Lent:
    """Which block of which model was put where. The host, who does not know, may have moved one since."""

    def __init__(self, bank: Bank) -> None:
        self._homes = Homes(bank)
        # The model that was placed last is at the end.
        self._blocks: WeakKeyDictionary[torch.nn.Module, dict[torch.nn.Module, str]] = WeakKeyDictionary()

    def of(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        """The blocks of a model, and where they were put."""
        return self._blocks.get(model, {})

    def on(self, device: str) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        """(model, block) of all that is on a device now; the model that was placed last comes last."""
        for model, blocks in list(self._blocks.items()):
            yield from ((model, block) for block, lent in list(blocks.items()) if lent == device == place_of(block))

    def forget_on(self, model: torch.nn.Module, own: str) -> None:
        """What is on the model's own device is not lent: the host may have been told to run it elsewhere since."""
        blocks = self.of(model)
        for block in [block for block, device in blocks.items() if device == own]:
            del blocks[block]

    def place(self, model: torch.nn.Module, blocks: Iterable[torch.nn.Module], device: str) -> tuple[int, str]:
        """Moves blocks of a model until one cannot be moved; that one is in RAM as before.

        Returns:
            How many were moved, and why no more were; "" if all were.
        """
        known = self._blocks[model] = self._blocks.pop(model, {})
        moved: list[torch.nn.Module] = []
        reason = ""
        for block in blocks:
            reason = self._move(block, device)
            if reason:
                break
            known[block] = device
            moved.append(block)
        self._mark(moved)
        return len(moved), reason

    def _move(self, block: torch.nn.Module, device: str) -> str:
        for name, parameter in block._parameters.items():
            self._homes.forget(block, name)
            if parameter is not None:
                self._homes.note(block, name, parameter)
        reason = ""
        try:
            with torch.inference_mode():
                block.to(device)
        except RuntimeError as error:  # torch's out-of-memory is one, and so is all that a driver says
            reason = str(error) or type(error).__name__
        if reason:  # outside of the except block, whose traceback holds what was half done
            with torch.inference_mode():
                for name, home in self._homes.get(block).items():
                    put(block, name, home.tensor)
                block.to(RAM)
        return reason

    def _mark(self, blocks: Sequence[torch.nn.Module]) -> None:
        """Takes the fingerprints of what was just copied, at the device's speed: by them it is known again."""
        homes = [(home, parameter) for block in blocks for name, home in self._homes.get(block).items()
                 if (parameter := block._parameters.get(name)) is not None]
        for (home, _), mark in zip(homes, fingerprints([parameter for _, parameter in homes]), strict=True):
            home.mark = mark

    def take_home(self, blocks: Sequence[torch.nn.Module]) -> None:
        """Back to RAM: what is unchanged becomes the mapping that it was, all else is copied."""
        with torch.inference_mode():
            lent = [(block, name, parameter, home) for block in blocks for name, home in self._homes.get(block).items()
                    if (parameter := block._parameters.get(name)) is not None and home.fits(parameter)]
            marks = fingerprints([parameter for _, _, parameter, _ in lent])
            for (block, name, _, home), mark in zip(lent, marks, strict=True):
                if mark is not None and mark == home.mark:
                    put(block, name, home.tensor)
                self._homes.forget(block, name)
            for block in blocks:
                block.to(RAM)
