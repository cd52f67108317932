"""Flux 1 and 2, and what has the same `forward_orig`."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from ..layout import Layout
from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, Residuals, instead


@contextlib.contextmanager
def flux(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread before anything is embedded, and gathered after the last layer. Positions follow; text comes before the image."""

    def around(forward: Callable[[], Any], arguments: Arguments) -> Any:
        references = arguments["transformer_options"].get("reference_image_num_tokens") or ()
        text = tokens.layout(arguments["txt"].shape[1])
        image = tokens.layout(arguments["img"].shape[1] - sum(references), *references)
        if arguments.get("control"):
            main = tokens.layout(image.segments[0])
            arguments["control"] = {name: Residuals(of_layers, tokens, lambda: main)
                                    for name, of_layers in arguments["control"].items()}
        if arguments.get("timestep_zero_index") is not None:
            arguments["timestep_zero_index"] = _here(arguments["timestep_zero_index"], image, tokens.rank)
        for name, layout in {"img": image, "img_ids": image, "txt": text, "txt_ids": text}.items():
            if arguments[name] is not None:
                arguments[name] = tokens.take(arguments[name], layout)
        tokens.spread = text + image
        made = forward()
        tokens.spread = None
        return tokens.gather(made, image)

    with instead(model, "forward_orig", around, ("img", "img_ids", "txt", "txt_ids")):
        yield


def _here(slices: Sequence[Sequence[int]], image: Layout, rank: int) -> list[list[int]]:
    """Slices of the image, which begin and end with segments, among this rank's tokens."""
    ends = list(accumulate(image.segments, initial=0))
    here = [0, *(piece.stop for piece in image.local(rank))]
    try:
        return [[here[ends.index(start)], here[ends.index(stop)]] for start, stop in slices]
    except ValueError:
        raise Unsuited(f"tokens {list(slices)} are not whole images of {image.segments}") from None
