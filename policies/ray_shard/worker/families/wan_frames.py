"""Wan's relatives in which the tokens of a frame attend to what belongs to that frame: a face, a sound, some music."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, Spread, instead
from .wan import spread_wan

SOUNDS = 16  # tokens of sound that HuMo has for a frame


@contextlib.contextmanager
def animate(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As Wan; a face is mixed into every fifth block's tokens."""
    with spread_wan(model, tokens) as spread, contextlib.ExitStack() as stack:
        for block in model.face_adapter.fuser_blocks:
            stack.enter_context(instead(block, "forward", partial(_face, spread), ("x", "motion_vec", "motion_mask")))
        yield


@contextlib.contextmanager
def humo(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As Wan; in each block a frame attends to its sound."""
    with spread_wan(model, tokens) as spread, contextlib.ExitStack() as stack:
        for block in model.blocks:
            stack.enter_context(instead(block.audio_cross_attn_wrapper, "forward", partial(_sound, spread), ("x", "audio")))
        yield


@contextlib.contextmanager
def s2v(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As Wan; sound is mixed into some blocks' tokens, of the video without its reference and what moved before."""
    injector = model.audio_injector
    with spread_wan(model, tokens) as spread, instead(injector, "forward", partial(_mixed, spread, injector), _MIXED):
        yield


@contextlib.contextmanager
def dancer(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As Wan, with music, eight pieces of it for a frame, and a second head for other rates of frames."""
    injector = model.music_injector
    with (spread_wan(model, tokens) as spread, instead(model.head_global, "forward", partial(spread.last, "")),
          instead(injector, "forward", partial(_mixed, spread, injector), _MIXED)):
        yield


def _face(spread: Spread, forward: Callable[[], Any], arguments: Arguments) -> torch.Tensor:
    faces = arguments["motion_vec"]
    if arguments["motion_mask"] is not None:
        raise Unsuited("a mask of faces is not known here")

    def run(x: torch.Tensor, frames: slice) -> Any:
        arguments.update(x=x, motion_vec=faces[:, frames])
        return forward()

    return by_frames(spread, arguments["x"], faces.shape[1], spread.whole.total, run)


def _sound(spread: Spread, forward: Callable[[], Any], arguments: Arguments) -> torch.Tensor:
    sounds = arguments["audio"].unflatten(1, (-1, SOUNDS))

    def run(x: torch.Tensor, frames: slice) -> Any:
        arguments.update(x=x, audio=sounds[:, frames].flatten(1, 2))
        return forward()

    return by_frames(spread, arguments["x"], sounds.shape[1], spread.whole.total, run)


_MIXED = ("x", "block_id", "audio_emb", "audio_emb_global", "seq_len")


def _mixed(spread: Spread, injector: Any, forward: Callable[[], Any], arguments: Arguments) -> Any:
    if arguments["block_id"] not in injector.injected_block_id:
        return forward()
    sounds, overall = arguments["audio_emb"], arguments["audio_emb_global"]

    def run(x: torch.Tensor, frames: slice) -> Any:
        arguments.update(x=x, audio_emb=sounds[:, frames], seq_len=x.shape[1],
                         audio_emb_global=None if overall is None else overall[:, frames])
        return forward()

    return by_frames(spread, arguments["x"], sounds.shape[1], arguments["seq_len"], run)


def by_frames(spread: Spread, x: torch.Tensor, frames: int, total: int,
              run: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """Of this rank's tokens, those of the frames as `run` makes them anew, and the rest as they are.

    Args:
        x: (batch, this rank's tokens, width).
        frames: how many there are, of as many tokens each.
        total: their tokens together, which come first in the sequence.
        run: is given whole frames, and which these are. Zeros stand for tokens that another rank has; what is made of them is
            dropped, as no token knows of another here.
    """
    here = spread.whole.pieces[spread.tokens.rank][0]
    size, rest = divmod(total, frames)
    if rest:
        raise Unsuited(f"{total} tokens are not {frames} frames of as many each")
    stop = min(here.stop, total)
    if stop <= here.start:
        return x
    first, last, mine = here.start // size, -(-stop // size), stop - here.start
    before = here.start - first * size
    with spread.tokens.apart():
        made = run(torch.nn.functional.pad(x[:, :mine], (0, 0, before, last * size - stop)), slice(first, last))
    return torch.cat([made[:, before:before + mine], x[:, mine:]], 1)
