"""Flux 1 and 2, and what has the same `forward_orig`: Chroma, and Chroma Radiance, whose tokens are made inside of it."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..layout import Layout
from ..tokens import TokenParallel
from .flow import Arguments, Residuals, enough, here, instead

NAMES = ("img", "img_ids", "txt", "txt_ids")


@contextlib.contextmanager
def flux(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread before anything is embedded, and gathered after the last layer. Positions follow; text comes before the image."""
    with instead(model, "forward_orig", partial(_spread, tokens, NAMES), NAMES):
        yield


@contextlib.contextmanager
def radiance(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """As Flux, but that an image's pixels become tokens in `img_in`. The layers that make pixels of tokens are given all, one
    after the other or some at a time, and a rank does its part of these."""
    part: Layout | None = None

    def embedded(forward: Callable[[], Any], _: Arguments) -> Any:
        made = forward()
        return tokens.take(made, tokens.layout(made.shape[1]))

    def pixels(forward: Callable[[], Any], arguments: Arguments) -> Any:
        nonlocal part
        part = tokens.layout(arguments["inputs"].shape[0])
        if not all(part.lengths):  # the last few are whole
            part = None
        else:
            arguments["inputs"] = tokens.take(arguments["inputs"], part, 0)
        return forward()

    def drawn(last: bool, forward: Callable[[], Any], arguments: Arguments) -> Any:
        if part is None:
            return forward()
        arguments["s"] = tokens.take(arguments["s"], part, 0)
        return tokens.gather(forward(), part, 0) if last else forward()

    with contextlib.ExitStack() as stack:
        stack.enter_context(instead(model, "forward_orig", partial(_spread, tokens, NAMES[1:]), NAMES))
        stack.enter_context(instead(model, "img_in", embedded))
        stack.enter_context(instead(model.nerf_image_embedder, "forward", pixels, ["inputs"]))
        for block in model.nerf_blocks:
            stack.enter_context(instead(block, "forward", partial(drawn, block is model.nerf_blocks[-1]), ["s"]))
        yield


def _spread(tokens: TokenParallel, names: tuple[str, ...], forward: Callable[[], Any], arguments: Arguments) -> Any:
    references = arguments["transformer_options"].get("reference_image_num_tokens") or ()
    text = tokens.layout(arguments["txt"].shape[1])
    image = tokens.layout(arguments[names[0]].shape[1] - sum(references), *references)
    enough(text, image)
    if arguments.get("control"):
        main = tokens.layout(image.segments[0])
        arguments["control"] = {name: Residuals(of_layers, tokens, lambda: main)
                                for name, of_layers in arguments["control"].items()}
    if arguments.get("timestep_zero_index") is not None:
        arguments["timestep_zero_index"] = here(arguments["timestep_zero_index"], image, tokens.rank)
    for name in names:
        if arguments[name] is not None:
            arguments[name] = tokens.take(arguments[name], image if name.startswith("img") else text)
    tokens.spread = text + image
    made = forward()
    tokens.spread = None
    return tokens.gather(made, image)
