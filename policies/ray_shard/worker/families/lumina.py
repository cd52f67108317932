"""Lumina 2 and Z-Image, of latents and of pixels."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

from ..tokens import TokenParallel
from .flow import Arguments, Spread, here, refuse

ZERO = "timestep_zero_index"


@contextlib.contextmanager
def lumina(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the layers, what refines text and images before them being whole, and gathered after the last layer; the
    model of pixels has none, and gets all tokens after the last block."""
    spread = Spread(tokens, ["x"], {"freqs_cis": 1}, _segments, _times)
    with spread.over(model.layers, getattr(model, "final_layer", None)):
        yield


def _segments(arguments: Arguments) -> dict[str, list[int]]:
    """Cut where tokens of another time begin."""
    refuse(arguments, "double_block")
    ends = sorted({0, arguments["x"].shape[1], *chain.from_iterable(arguments.get(ZERO) or ())})
    return {"x": [stop - start for start, stop in pairwise(ends)]}


def _times(spread: Spread, arguments: Arguments) -> None:
    if arguments.get(ZERO) is not None:
        arguments[ZERO] = here(arguments[ZERO], spread.whole, spread.tokens.rank)
