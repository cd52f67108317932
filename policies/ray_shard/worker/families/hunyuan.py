"""HunyuanVideo 1 and 1.5, and HunyuanImage."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..layout import Layout
from ..tokens import TokenParallel
from .flow import Arguments, Residuals, Spread, instead

TEXT, IMAGE, DIMS = "txt", "img", "modulation_dims"


@contextlib.contextmanager
def hunyuan(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over both lists of blocks, text before image, and gathered after the last layer. An image that is referred to
    comes before the one that is made."""
    main = 0

    def whole(forward: Callable[[], Any], arguments: Arguments) -> Any:
        nonlocal main
        main = arguments["img_ids"].shape[1]
        if control := arguments.get("control"):
            arguments["control"] = {name: Residuals(of_layers, tokens, lambda: spread.layouts[IMAGE])
                                    for name, of_layers in control.items()}
        return forward()

    def segments(arguments: Arguments) -> dict[str, list[int]]:
        reference = arguments[IMAGE].shape[1] - main
        return {TEXT: [arguments[TEXT].shape[1]], IMAGE: [reference, main] if reference else [main]}

    spread = Spread(tokens, [TEXT, IMAGE], {"pe": 2}, segments, _modulated)
    with contextlib.ExitStack() as stack:
        stack.enter_context(instead(model, "forward_orig", whole, ("img_ids", "control")))
        stack.enter_context(spread.over(model.double_blocks, model.final_layer, IMAGE))
        for block in model.single_blocks:
            around = partial(_single, spread, block is model.single_blocks[-1])
            stack.enter_context(instead(block, "forward", around, ("x", "pe", DIMS)))
        yield


def _single(spread: Spread, ends: bool, forward: Callable[[], Any], arguments: Arguments) -> torch.Tensor:
    spread.follow(arguments)
    made: torch.Tensor = forward()
    image = spread.layouts[IMAGE]
    if not ends or len(image.segments) == 1:
        return made
    # The model counts the reference's tokens, and cuts off as many: there are as many, and the image is what is left.
    text, here = (spread.layouts[name].lengths[spread.tokens.rank] for name in (TEXT, IMAGE))
    spread.layouts[IMAGE] = main = spread.tokens.layout(image.segments[-1])
    kept = text + here - main.lengths[spread.tokens.rank]
    return torch.cat([made[:, :text], made.new_zeros(len(made), image.segments[0], made.shape[2]), made[:, kept:]], 1)


def _modulated(spread: Spread, arguments: Arguments) -> None:
    """Where a frame is given, its tokens have a time of their own: which are they among this rank's?"""
    of_all = spread.whole if "pe" in arguments else spread.layouts[IMAGE]  # the last layer gets no positions
    for name, layout in {f"{DIMS}_img": spread.layouts[IMAGE], f"{DIMS}_txt": spread.layouts[TEXT], DIMS: of_all}.items():
        if arguments.get(name) is not None:
            arguments[name] = list(_here(arguments[name], layout, spread.tokens.rank))


def _here(dims: Sequence[tuple[int, int | None, int]], layout: Layout, rank: int) -> Iterator[tuple[int, int, int]]:
    """(from, to, which time) for each slice of the whole, and each piece of it that is this rank's."""
    for start, stop, time in dims:
        for piece, here in zip(layout.pieces[rank], layout.local(rank), strict=True):
            first, last = max(start, piece.start), min(layout.total if stop is None else stop, piece.stop)
            if first < last:
                yield here.start + first - piece.start, here.start + last - piece.start, time
