"""Cosmos Predict 2, and Anima."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, Spread, across, refuse

X, PLACES = "x_B_T_H_W_D", "extra_per_block_pos_emb"
TIMES = ("emb_B_T_D", "adaln_lora_B_T_3D")


@contextlib.contextmanager
def cosmos(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks, and gathered after the last layer."""
    spread = _Grid(tokens, [X], {"rope_emb_L_1_1_D": 1}, each=_follow)
    with spread.over(model.blocks, model.final_layer), across(tokens, model.blocks, "cross_attn"):
        yield


class _Grid(Spread):
    """Of tokens that come as (batch, frames, rows, columns, width), and that blocks see as so many frames of one token each.

    Attributes:
        grid: frames, rows and columns.
    """

    grid: tuple[int, ...] = ()

    def start(self, arguments: Arguments) -> None:
        refuse(arguments, "attn1_patch", "attn2_patch", "mlp_patch")
        self.grid = tuple(arguments[X].shape[1:4])
        arguments[X] = _in_line(arguments[X])
        super().start(arguments)

    def gather(self, tensor: torch.Tensor, stream: str = "") -> torch.Tensor:
        return super().gather(tensor, stream).reshape(tensor.shape[0], *self.grid, tensor.shape[-1])

    def by_token(self, times: torch.Tensor) -> torch.Tensor:
        """What every frame has, for each of this rank's tokens."""
        if times.shape[1] != self.grid[0]:
            raise Unsuited(f"{times.shape[1]} times are not of {self.grid[0]} frames")
        return self.tokens.take(times.repeat_interleave(self.grid[1] * self.grid[2], 1), self.whole)


def _in_line(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1, 3)[:, :, None, None]


def _follow(spread: Any, arguments: Arguments) -> None:
    """One time is all tokens'."""
    for name in TIMES:
        if (times := arguments[name]) is not None and times.shape[1] > 1:
            arguments[name] = spread.once(name, times, spread.by_token)
    if (places := arguments.get(PLACES)) is not None:
        arguments[PLACES] = spread.once(PLACES, places, lambda places: spread.tokens.take(_in_line(places), spread.whole))
