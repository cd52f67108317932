"""HiDream O1: a language model, whose text sees no image."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..layout import Layout
from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, instead

X, TURNS, PAST = "x", "freqs_cis", "past_key_value"


@contextlib.contextmanager
def hidream_o1(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Images are spread over the layers, and gathered after the last. The text before them is whole on every rank: it attends
    to itself, and its keys and values are kept from one step to the next."""
    text = 0

    def begin(forward: Callable[[], Any], arguments: Arguments) -> Any:
        nonlocal text
        if arguments["ar_len"] is None:
            raise Unsuited("nobody says where the text ends")
        text = max(arguments["ar_len"], 0)
        return forward()

    def layer(begins: bool, ends: bool, forward: Callable[[], Any], arguments: Arguments) -> Any:
        here = 0 if arguments[PAST] else text  # what is kept need not come again
        if begins:
            tokens.spread, tokens.before = tokens.layout(arguments[X].shape[1] - here), text
            arguments[X] = _after(tokens, arguments[X], here, 1)
        arguments[TURNS] = tuple(_after(tokens, turn, here, -2) for turn in arguments[TURNS])
        made, kept = forward()
        if ends:
            layout, tokens.spread, tokens.before = _spread(tokens), None, 0
            made = torch.cat([made[:, :here], tokens.gather(made[:, here:].contiguous(), layout)], 1)
        return made, kept

    layers, names = model.language_model.layers, (X, TURNS, PAST)
    with contextlib.ExitStack() as stack:
        stack.enter_context(instead(model, "_forward", begin, ["ar_len"]))
        for each in layers:
            stack.enter_context(instead(each, "forward", partial(layer, each is layers[0], each is layers[-1]), names))
        yield


def _spread(tokens: TokenParallel) -> Layout:
    assert tokens.spread is not None
    return tokens.spread


def _after(tokens: TokenParallel, tensor: torch.Tensor, text: int, dim: int) -> torch.Tensor:
    """The text whole, and of what comes after it this rank's part."""
    images = tensor.narrow(dim, text, tensor.shape[dim] - text)
    return torch.cat([tensor.narrow(dim, 0, text), tokens.take(images, _spread(tokens), dim)], dim)
