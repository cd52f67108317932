"""MiniMax H3: text, references, sound and video in one sequence."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..tokens import TokenParallel
from .flow import Arguments, Spread, here

SEGMENTS, OUTPUTS = "mod_segments", ("video_seg", "audio_seg")


@contextlib.contextmanager
def minimax(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks, and gathered, video and sound each, after the last layer."""
    spread = _Rows(tokens, ["x"], {"rope_freqs": 1}, _segments, _modulated)
    with spread.over(model.blocks, model.final_layer):
        yield


class _Rows(Spread):
    """Of tokens that come as (tokens, width), and that end as video and as sound.

    Attributes:
        made: how many tokens each has.
    """

    made: tuple[int, ...] = ()

    def start(self, arguments: Arguments) -> None:
        arguments["x"] = arguments["x"][None]
        super().start(arguments)
        arguments["x"] = arguments["x"][0]

    def gather(self, made: Any, stream: str = "") -> Any:
        self.tokens.spread = None
        return tuple(self.tokens.gather(part, self.tokens.layout(length), 0)
                     for part, length in zip(made, self.made, strict=True))


def _segments(arguments: Arguments) -> dict[str, list[int]]:
    """Each has its own modulation."""
    return {"x": [stop - start for start, stop, _ in arguments[SEGMENTS]]}


def _modulated(spread: Any, arguments: Arguments) -> None:
    def local(segments: Any) -> list[tuple[int, ...]]:
        ranges = here([segment[:2] for segment in segments], spread.whole, spread.tokens.rank)
        return [(*ends, segment[2]) for ends, segment in zip(ranges, segments, strict=True)]

    if SEGMENTS in arguments:
        arguments[SEGMENTS] = local(arguments[SEGMENTS])
    else:  # the last layer
        spread.made = tuple(arguments[name][1] - arguments[name][0] for name in OUTPUTS)
        for name in OUTPUTS:
            arguments[name], = local([arguments[name]])
