"""Stable Diffusion 3 and 3.5."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, Residuals, enough, instead


@contextlib.contextmanager
def sd3(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread when all is embedded, positions with it, and gathered after the last layer; text comes before the image."""
    if getattr(model, "register_length", 0):
        raise Unsuited("the model puts tokens of its own before the text")
    with contextlib.ExitStack() as stack:
        for block in model.joint_blocks:
            if getattr(block.x_block, "x_block_self_attn", False):
                stack.enter_context(_then_alone(block, tokens))
        stack.enter_context(instead(model, "forward_core_with_concat", partial(_core, tokens), ("x", "context", "control")))
        yield


def _core(tokens: TokenParallel, forward: Callable[[], Any], arguments: Arguments) -> Any:
    if arguments["context"] is None:
        raise Unsuited("there is no text")
    image, text = (tokens.layout(arguments[name].shape[1]) for name in ("x", "context"))
    enough(image, text)
    if arguments["control"]:
        arguments["control"] = {name: Residuals(of_layers, tokens, lambda: image)
                                for name, of_layers in arguments["control"].items()}
    arguments["x"], arguments["context"] = tokens.take(arguments["x"], image), tokens.take(arguments["context"], text)
    tokens.spread = text + image
    made = forward()
    tokens.spread = None
    return tokens.gather(made, image)


@contextlib.contextmanager
def _then_alone(block: Any, tokens: TokenParallel) -> Iterator[None]:
    """A block whose image attends to itself when both have attended to both. Between the two the text goes its own way."""
    if block.context_block.pre_only:
        raise Unsuited("the image attends alone in a block in which the text ends")
    joint = None

    def text(forward: Callable[[], Any], arguments: Arguments) -> Any:
        nonlocal joint
        joint = tokens.spread
        if joint is not None:
            tokens.spread = tokens.layout(joint.segments[1])
        return forward()

    def image(forward: Callable[[], Any], arguments: Arguments) -> Any:
        tokens.spread = joint
        return forward()

    with instead(block.context_block, "post_attention", text), instead(block.x_block, "post_attention_x", image):
        yield
