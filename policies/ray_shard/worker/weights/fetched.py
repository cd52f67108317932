"""A model of which blocks come when they are computed, and go afterwards; the next one travels while one is computed.

What travels are bytes, with whatever ComfyUI's patcher made of a block's weights, LoRA included. All workers compute the
same, or share heads or tokens.
"""
from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch

from . import sheets
from .owned import Owned, Predict
from .units import Slot


class Coming(Protocol):
    """A block's bytes on their way."""

    def wait(self) -> torch.Tensor: ...


class Fetched(Owned):
    """See `Owned`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._sheets: dict[int, bytes] = {}  # by block: what its bytes are
        self._coming: tuple[int, Coming] | None = None
        self._after: dict[int, int] = {}  # by block: which one was computed next, the last time
        self._before: int | None = None
        self._inside: tuple[int, dict[Slot, Any]] | None = None  # the block that has what came, and what it had instead

    @abc.abstractmethod
    def _begin(self, index: int) -> Coming:
        """Brings a block's bytes to all ranks."""

    @abc.abstractmethod
    def _done(self, index: int) -> None:
        """The bytes that came are used no longer."""

    def _run(self, predict: Predict, x: torch.Tensor, arguments: dict[str, Any], apart: bool) -> torch.Tensor:
        self._before = None
        with self._watched():
            answer = predict(x, arguments)
            self._pass_over()
        return answer

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Weights come before a block is computed, and go afterwards, also from one that fails or is called off."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            for index, unit in enumerate(self.units):
                stack.enter_context(unit.module.register_forward_pre_hook(partial(self._enter, index)))
                if index in self._away:
                    stack.enter_context(unit.module.register_forward_hook(self._leave))
            yield

    def _enter(self, index: int, module: torch.nn.Module, args: Any) -> None:
        if self._coming is None or self._coming[0] != index:
            self._pass_over()
            self._coming = index, self._begin(index)
        (_, coming), self._coming = self._coming, None
        flat = coming.wait()
        if index in self._away:
            self._inside = index, self.units[index].lay(sheets.read(self._sheets[index], flat))
        if self._before is not None:
            self._after[self._before] = index
        self._before = index
        following = self._after.get(index, index + 1)
        if following < len(self.units):
            self._coming = following, self._begin(following)

    def _leave(self, *_: Any) -> None:
        if self._inside is not None:
            (index, instead), self._inside = self._inside, None
            self.units[index].lay(instead)
            self._done(index)

    def _end(self) -> None:
        """What is still coming is not waited for: whoever was to send it may be gone."""
        self._leave()
        self._coming = None

    def _pass_over(self) -> None:
        """A block that came is not the one that is computed."""
        if self._coming is not None:
            (index, coming), self._coming = self._coming, None
            coming.wait()
            self._done(index)
