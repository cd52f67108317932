"""Qwen-Image and Qwen-Image-Edit."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, Residuals, Spread, instead

TEXT, IMAGE, MASK, ZERO = "encoder_hidden_states", "hidden_states", "encoder_hidden_states_mask", "timestep_zero_index"


@contextlib.contextmanager
def qwen(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread over the blocks, text before image, and gathered after the last layer."""
    spread = Spread(tokens, [TEXT, IMAGE], {"image_rotary_emb": 2}, _segments, _block)
    with instead(model, "_forward", partial(_control, spread)), spread.over(model.transformer_blocks, model.proj_out, IMAGE):
        yield


def _control(spread: Spread, forward: Callable[[], Any], arguments: Arguments) -> Any:
    if control := arguments.get("control"):
        arguments["control"] = {name: Residuals(of_layers, spread.tokens, lambda: _main(spread))
                                for name, of_layers in control.items()}
    return forward()


def _main(spread: Spread) -> Any:
    return spread.tokens.layout(spread.layouts[IMAGE].segments[0])


def _segments(arguments: Arguments) -> dict[str, list[int]]:
    references = arguments["transformer_options"].get("reference_image_num_tokens") or ()
    return {TEXT: [arguments[TEXT].shape[1]], IMAGE: [arguments[IMAGE].shape[1] - sum(references), *references]}


def _block(spread: Spread, arguments: Arguments) -> None:
    """The references' time begins where they begin; a mask of the text is put together here, where its length is known."""
    image = spread.layouts[IMAGE]
    if (zero := arguments.get(ZERO)) is not None:
        if zero != image.segments[0]:
            raise Unsuited(f"{zero} tokens are not the image's {image.segments[0]}")
        arguments[ZERO] = len(image.pieces[spread.tokens.rank][0])
    if (mask := arguments.get(MASK)) is not None:
        spread.tokens.mask = spread.once(MASK, mask, lambda mask: _joint(spread, mask))
        arguments[MASK] = None


def _joint(spread: Spread, mask: torch.Tensor) -> torch.Tensor:
    """(batch, 1, all tokens): the image is seen whole."""
    text = spread.layouts[TEXT].total
    joint = mask.new_zeros((mask.shape[0], 1, spread.whole.total))
    joint[..., :text] = mask.reshape(mask.shape[0], 1, text)
    return joint
