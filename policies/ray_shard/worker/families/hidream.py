"""HiDream I1."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..layout import Layout
from ..tokens import TokenParallel, Unsuited
from .flow import Arguments, enough, instead

IMAGE, TEXT = "image_tokens", "text_tokens"
NEEDS = (IMAGE, "image_tokens_masks", TEXT, "rope")


@contextlib.contextmanager
def hidream(model: Any, tokens: TokenParallel) -> Iterator[None]:
    """Spread from the first block on, image before text, and gathered after the last layer."""
    flow = _Streams(tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(instead(model, "_forward", flow.begin, ("context", "encoder_hidden_states_llama3")))
        for block in model.double_stream_blocks:
            stack.enter_context(instead(block, "forward", flow.double, NEEDS))
        for block in model.single_stream_blocks:
            stack.enter_context(instead(block, "forward", flow.single, NEEDS))
        stack.enter_context(instead(model.final_layer, "forward", flow.end))
        yield


class _Streams:
    """The image, a text that goes on from block to block, and after it each block's own text, which is whole when it comes."""

    def __init__(self, tokens: TokenParallel) -> None:
        self._tokens = tokens
        self._lengths = (0, 0)
        self._image: Layout | None = None
        self._rope: torch.Tensor | None = None

    def begin(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        """What goes on is T5's text and the last of the language model's layers."""
        own = arguments["encoder_hidden_states_llama3"].shape[2]
        self._lengths = (arguments["context"].shape[1] + own, own)
        return forward()

    def double(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        going, own = (self._tokens.layout(length) for length in self._lengths)
        if self._tokens.spread is None:
            self._start(arguments, going, own)
        arguments["rope"] = self._rope
        arguments[TEXT] = self._own_taken(arguments[TEXT])
        image, text = forward()
        return image, text[:, :going.lengths[self._tokens.rank]]  # the model takes no more than what goes on

    def single(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        if self._tokens.spread is None:
            raise Unsuited("the text is joined to the image in the first block")
        arguments["rope"] = self._rope
        arguments[IMAGE] = self._own_taken(arguments[IMAGE])
        return forward()

    def end(self, forward: Callable[[], Any], arguments: Arguments) -> Any:
        made = forward()
        self._tokens.spread = self._rope = None
        assert self._image is not None
        return self._tokens.gather(made, self._image)

    def _start(self, arguments: Arguments, going: Layout, own: Layout) -> None:
        if arguments["image_tokens_masks"] is not None or arguments[TEXT].shape[1] != going.total + own.total:
            raise Unsuited("images are masked, or texts have other lengths")
        self._image = self._tokens.layout(arguments[IMAGE].shape[1])
        enough(self._image, going + own)
        whole = self._image + going + own
        self._rope = self._tokens.take(arguments["rope"], whole)
        arguments[IMAGE] = self._tokens.take(arguments[IMAGE], self._image)
        first, rest = torch.split(arguments[TEXT], [going.total, own.total], 1)
        arguments[TEXT] = torch.cat([self._tokens.take(first, going), rest], 1)
        self._tokens.spread = whole

    def _own_taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """A block's own text is the last of it."""
        own = self._tokens.layout(self._lengths[1])
        ours, whole = torch.split(tensor, [tensor.shape[1] - own.total, own.total], 1)
        return torch.cat([ours, self._tokens.take(whole, own)], 1)
