"""What the families of models have in common: calls are looked at, and a list of blocks is run on tokens that are spread."""
from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from ..layout import Layout
from ..tokens import TokenParallel, Unsuited

Arguments = dict[str, Any]
Around = Callable[[Callable[[], Any], Arguments], Any]


@contextlib.contextmanager
def instead(owner: Any, name: str, around: Around, needs: Sequence[str] = ()) -> Iterator[None]:
    """Until the end of the `with`, who calls `owner.name` calls `around`: with the original, to be called without arguments,
    and its arguments by name, which may be changed before.

    Raises:
        Unsuited: there is no such function, or it has no such arguments: another release of ComfyUI.
    """
    original = getattr(owner, name, None)
    if original is None or name in vars(owner):
        raise Unsuited(f"{type(owner).__name__}.{name} is {'not there' if original is None else 'replaced by a pack'}")
    signature = inspect.signature(original)
    if missing := set(needs) - set(signature.parameters):
        raise Unsuited(f"{type(owner).__name__}.{name} takes no {' or '.join(sorted(missing))}")

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return around(lambda: original(*bound.args, **bound.kwargs), bound.arguments)

    vars(owner)[name] = wrapped
    try:
        yield
    finally:
        del vars(owner)[name]


@contextlib.contextmanager
def within(blocks: Sequence[Any], names: Sequence[str], context: Callable[[], contextlib.AbstractContextManager[None]]
           ) -> Iterator[None]:
    """These modules of the blocks, where they are, run in such a context."""
    def around(forward: Callable[[], Any], _: Arguments) -> Any:
        with context():
            return forward()

    with contextlib.ExitStack() as stack:
        for block in blocks:
            for name in names:
                if (module := getattr(block, name, None)) is not None:
                    stack.enter_context(instead(module, "forward", around))
        yield


def across(tokens: TokenParallel, blocks: Sequence[Any], *names: str) -> contextlib.AbstractContextManager[None]:
    """These modules of the blocks attend to what every rank has whole, as a text."""
    return within(blocks, names, tokens.apart)


class Spread:
    """A list of blocks whose streams of tokens are spread among the ranks from the first on.

    Args:
        streams: the arguments of a block that hold tokens, (batch, tokens, width), in the order in which attention joins them.
        follow: arguments that have a value for each token that attends: by name, along which dimension. None may be passed, or
            one value for all tokens.
        segments: the segments of each stream, of a block's arguments; a stream is one segment if left out.
        each: changes arguments of every block.

    Attributes:
        layouts: of each stream.
    """

    def __init__(self, tokens: TokenParallel, streams: Sequence[str], follow: Mapping[str, int] | None = None,
                 segments: Callable[[Arguments], Mapping[str, Sequence[int]]] | None = None,
                 each: Callable[[Spread, Arguments], None] | None = None) -> None:
        self.tokens = tokens
        self._streams, self._follow, self._segments, self._each = tuple(streams), dict(follow or {}), segments, each
        self.layouts: dict[str, Layout] = {}
        self._taken: dict[tuple[str, int], tuple[Any, Any]] = {}

    @property
    def whole(self) -> Layout:
        """Of all streams together."""
        layout = self.tokens.spread
        assert layout is not None
        return layout

    @contextlib.contextmanager
    def over(self, blocks: Sequence[Any], last: Any = None, stream: str = "") -> Iterator[None]:
        """Spreads the tokens before the first block, and gathers them after the last; or after `last`, a module that comes
        later and makes fewer numbers of each token of one stream, the first by default. `each` is asked for it too."""
        with contextlib.ExitStack() as stack:
            for block in blocks:
                ends = block is blocks[-1] and last is None
                stack.enter_context(instead(block, "forward", self._block(block is blocks[0], ends),
                                            (*self._streams, *self._follow)))
            if last is not None:
                stack.enter_context(instead(last, "forward", functools.partial(self.last, stream)))
            yield

    def _block(self, begins: bool, ends: bool) -> Around:
        def around(forward: Callable[[], Any], arguments: Arguments) -> Any:
            if begins:
                self.start(arguments)
            self.follow(arguments)
            return self._finish(forward()) if ends else forward()

        return around

    def follow(self, arguments: Arguments) -> None:
        """Spreads what has a value for each token, among a block's arguments."""
        for name, dim in self._follow.items():
            arguments[name] = self.once(name, arguments[name], functools.partial(self._cut, dim=dim))
        if self._each is not None:
            self._each(self, arguments)

    def last(self, stream: str, forward: Callable[[], Any], arguments: Arguments) -> Any:
        """Gathers what a module that comes after the blocks makes of a stream, of the first by default."""
        if self._each is not None:
            self._each(self, arguments)
        return self.gather(forward(), stream)

    def start(self, arguments: Arguments) -> None:
        """Spreads the streams among these arguments."""
        alone = {name: (arguments[name].shape[1],) for name in self._streams}
        segments = alone if self._segments is None else self._segments(arguments)
        self._taken.clear()
        self.layouts = {name: self.tokens.layout(*segments[name]) for name in self._streams}
        enough(*self.layouts.values())
        joint = self.layouts[self._streams[0]]
        for name in self._streams[1:]:
            joint += self.layouts[name]
        self.tokens.spread = joint
        for name, layout in self.layouts.items():
            arguments[name] = self.tokens.take(arguments[name], layout)

    def gather(self, tensor: torch.Tensor, stream: str = "") -> torch.Tensor:
        """The whole of a stream, the first by default; the tokens are not spread from here on."""
        self.tokens.spread = None
        return self.tokens.gather(tensor, self.layouts[stream or self._streams[0]])

    def once(self, name: str, value: Any, make: Callable[[Any], Any]) -> Any:
        """What is made of an argument that all blocks get."""
        key = (name, id(value))
        if key not in self._taken:
            self._taken[key] = (value, make(value))  # which keeps it, and so its id
        return self._taken[key][1]

    def _cut(self, tensor: Any, dim: int) -> Any:
        return tensor if tensor is None or tensor.shape[dim] == 1 else self.tokens.take(tensor, self.whole, dim)

    def _finish(self, made: Any) -> Any:
        several = isinstance(made, tuple)
        parts = list(made) if several else [made]
        for place, name in enumerate(self._streams):
            parts[place] = self.gather(parts[place], name)
        return tuple(parts) if several else parts[0]


class Residuals(list[Any]):
    """A ControlNet's residuals, (batch, tokens, width) each: while tokens are spread, this rank's part of each."""

    def __init__(self, residuals: Sequence[Any], tokens: TokenParallel, layout: Callable[[], Layout]) -> None:
        super().__init__(residuals)
        self._tokens, self._layout = tokens, layout

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return found if found is None or self._tokens.spread is None else self._tokens.take(found, self._layout())


def here(slices: Sequence[Sequence[int]], layout: Layout, rank: int) -> list[list[int]]:
    """Slices of the whole, which begin and end with segments, among a rank's tokens.

    Raises:
        Unsuited: one does not.
    """
    ends = list(accumulate(layout.segments, initial=0))
    local = [0, *(piece.stop for piece in layout.local(rank))]
    try:
        return [[local[ends.index(start)], local[ends.index(stop)]] for start, stop in slices]
    except ValueError:
        raise Unsuited(f"tokens {list(slices)} are not whole segments of {layout.segments}") from None


def enough(*layouts: Layout) -> None:
    """Every rank has some tokens of each stream: models make shapes of their numbers, which none may be for.

    Raises:
        Unsuited: one has not.
    """
    for layout in layouts:
        if not all(layout.lengths):
            raise Unsuited(f"{layout.total} tokens are not enough for all workers")


def refuse(arguments: Arguments, *names: str) -> None:
    """Patches that want to see all tokens where a rank has its own only.

    Raises:
        Unsuited: there are such.
    """
    patches = arguments["transformer_options"].get("patches", {})
    if found := [name for name in names if patches.get(name)]:
        raise Unsuited(f"there are patches that look at tokens: {', '.join(found)}")
