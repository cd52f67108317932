"""Kandinsky 5."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..tokens import TokenParallel
from .flow import Spread, across


@contextlib.contextmanager
def kandinsky(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks of the image, and gathered after them: the last layer gets frames. The text's blocks are whole."""
    blocks = model.visual_transformer_blocks
    with Spread(tokens, ["visual_embed"], {"freqs": 1}).over(blocks), across(tokens, blocks, "cross_attention"):
        yield
