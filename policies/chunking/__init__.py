"""Feed-forwards in pieces: these modules of a diffusion model widen every token four times or more for a moment. Tokens do not
know of each other there, so pieces of them give the same, one after the other, in a fraction of the memory.

Nothing is patched for good: a module's `forward` stands on the instance while a prediction lasts. What is fused with attention,
as in Flux's single blocks, is no module of its own and stays whole.
"""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...telemetry import emit
from . import run
from .structure import feed_forwards

SETTING = {"minimum": 1, "maximum": 64}  # how many pieces, of a policy's settings
_NONE = "it has no feed-forward of its own that could be run in pieces"


@dataclass
class Tally:
    """Feed-forwards of one prediction: that were found, calls, calls in pieces; and why one was not.

    `asked` is False where nothing was to be run in pieces."""

    asked: bool = True
    found: int = 0
    calls: int = 0
    in_pieces: int = 0
    reason: str = ""

    def ineffective(self) -> str:
        """Why nothing was run in pieces; "" if something was, or nothing was computed."""
        if not self.asked or self.in_pieces or (self.found and not self.calls):
            return ""
        return self.reason or _NONE


class Chunking:
    """Runs feed-forwards in pieces.

    Args:
        pieces: that the tokens are cut into; with 1 nothing is touched.
    """

    def __init__(self, pieces: int) -> None:
        self._pieces = pieces
        self._checked: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()  # why not; "" is fit

    @contextlib.contextmanager
    def during(self, model: torch.nn.Module) -> Iterator[Tally]:
        """Until the end of the `with`, the model's feed-forwards are run in pieces."""
        tally, stood = Tally(asked=self._pieces > 1), list[tuple[torch.nn.Module, Any]]()
        try:
            for module in feed_forwards(model) if tally.asked else ():
                forward = functools.partial(self._forward, module, module.forward, tally)
                vars(module)["forward"] = forward
                stood.append((module, forward))
            tally.found = len(stood)
            yield tally
        finally:
            for module, forward in stood:
                if vars(module).get("forward") is forward:
                    del vars(module)["forward"]

    def _forward(self, module: torch.nn.Module, forward: run.Forward, tally: Tally, *args: Any, **kwargs: Any) -> Any:
        tally.calls += 1
        if not run.fits(args, kwargs):
            return forward(*args, **kwargs)
        x = run.flat(args[0])
        pieces = run.count(x, self._pieces)
        if pieces < 2:
            tally.reason = tally.reason or f"its feed-forwards got fewer than {2 * run.LEAST} tokens"
            return forward(*args)
        if module not in self._checked:
            self._checked[module] = run.check(module, forward, x)
        if self._checked[module]:
            tally.reason = f"{type(module).__name__} stays whole: {self._checked[module]}"
            return forward(*args)
        tally.in_pieces += 1
        made = run.in_pieces(forward, x, pieces)
        return made.view(*args[0].shape[:-1], -1)


class Ineffective:
    """Says once of each model that nothing of it was run in pieces.

    Args:
        policy: whose setting it was.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._told: set[tuple[str, str]] = set()

    def tell(self, model: str, reason: str) -> None:
        if reason and (model, reason) not in self._told:
            self._told.add((model, reason))
            emit("policy.ineffective", policy=self._policy, reason=f"ffn_chunks: {model}: {reason}")
