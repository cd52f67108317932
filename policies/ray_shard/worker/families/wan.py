"""Wan 2.1 and 2.2, with references, poses, a camera, and VACE's hints."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..tokens import TokenParallel
from .flow import Arguments, Spread, across, instead


@contextlib.contextmanager
def wan(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks, and gathered after the head."""
    with spread_wan(model, tokens):
        yield


@contextlib.contextmanager
def vace(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As Wan. Hints have as many tokens as the video, and blocks of their own, of which the first adds the video to them."""
    blocks = list(getattr(model, "vace_blocks", []))
    with spread_wan(model, tokens) as spread, across(tokens, blocks, "cross_attn"), contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(instead(block, "forward", partial(_hint, spread, block is blocks[0]), ("c", "x", "kwargs")))
        yield


@contextlib.contextmanager
def spread_wan(model: Any, tokens: TokenParallel) -> Iterator[Spread]:
    """The blocks and the head that all of the kind have."""
    spread = Spread(tokens, ["x"], {"freqs": 1}, each=_times)
    with spread.over(model.blocks, model.head), across(tokens, model.blocks, "cross_attn"):
        yield spread


def _hint(spread: Spread, begins: bool, forward: Callable[[], Any], arguments: Arguments) -> Any:
    if begins:
        arguments["c"] = spread.tokens.take(arguments["c"], spread.whole)
        arguments["x"] = spread.once("x", arguments["x"], lambda video: spread.tokens.take(video, spread.whole))
    spread.follow(arguments["kwargs"])
    return forward()


def _times(spread: Spread, arguments: Arguments) -> None:
    """Where every frame has a time of its own, a token's is its frame's."""
    frames = 4 if "freqs" in arguments else 3  # dimensions of (batch, frames, 6, width), and in the head (batch, frames, width)
    if arguments["e"].ndim == frames and arguments["e"].shape[1] > 1:
        arguments["e"] = spread.once("e", arguments["e"], lambda times: _by_token(spread, times))


def _by_token(spread: Spread, times: torch.Tensor) -> torch.Tensor:
    total = spread.whole.total
    repeats = -(-total // times.shape[1])  # as the model's `repeat_e`: the last frame may have fewer
    return spread.tokens.take(times.repeat_interleave(repeats, 1)[:, :total], spread.whole)
