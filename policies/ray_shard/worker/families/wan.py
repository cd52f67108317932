"""Wan 2.1 and 2.2."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..tokens import TokenParallel
from .flow import Arguments, Spread, across


@contextlib.contextmanager
def wan(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks, and gathered after the head."""
    spread = Spread(tokens, ["x"], {"freqs": 1}, each=_times)
    with spread.over(model.blocks, model.head), across(tokens, model.blocks, "cross_attn"):
        yield


def _times(spread: Spread, arguments: Arguments) -> None:
    """Where every frame has a time of its own, a token's is its frame's."""
    frames = 4 if "freqs" in arguments else 3  # dimensions of (batch, frames, 6, width), and in the head (batch, frames, width)
    if arguments["e"].ndim == frames and arguments["e"].shape[1] > 1:
        arguments["e"] = spread.once("e", arguments["e"], lambda times: _by_token(spread, times))


def _by_token(spread: Spread, times: torch.Tensor) -> torch.Tensor:
    total = spread.whole.total
    repeats = -(-total // times.shape[1])  # as the model's `repeat_e`: the last frame may have fewer
    return spread.tokens.take(times.repeat_interleave(repeats, 1)[:, :total], spread.whole)
