"""Sequence parallelism: every rank has a part of the tokens, and of each attention some of the heads over all of them.

All but attention looks at one token at a time. Before an attention the ranks exchange, in one collective, each its tokens'
queries, keys and values of the heads that another computes; after it, the results, back to whose tokens they are (DeepSpeed-
Ulysses, arXiv:2309.14509). Neither tokens nor heads need be a multiple of the ranks. It is exact: what attends is the whole
sequence in its own order, so that masks, and an attention function of the user's, see what they would see on one device.

What flows where in a model is said by its family (`families`).
"""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from .group import Exchange
from .heads import split
from .layout import Layout
from .pace import Pace
from .parallel import Attention, Parallel


class Unsuited(Exception):
    """This call's tokens cannot be shared out. All ranks find it alike, before or after the same exchanges."""


class TokenParallel(Parallel):
    """Shares the tokens of a step among the ranks of a group; `attention` is an override for ComfyUI's `transformer_options`.

    Args:
        shares: of tokens and heads, one for each rank, in any unit; equal if left out.
        pace: in how many lots an attention's heads are exchanged.

    Attributes:
        rank: this process's.
        shared: attention calls in which tokens were exchanged.
        whole: others: those of what every rank has whole.
        mask: of all tokens, for attentions that are given none, because the model would make it of its own tokens only.
        parts: masks of attentions in which only part of the queries take part, and how these are spread.
        before: keys and values that every rank has whole, before those of the tokens that are spread.
    """

    def __init__(self, group: Exchange, shares: Sequence[float] | None = None, pace: Pace | None = None) -> None:
        super().__init__(group, shares)
        self._pace = pace or Pace(group)
        self.rank = group.rank
        self._layouts: tuple[Layout, Layout] | None = None  # of queries; of keys and values
        self.mask: torch.Tensor | None = None
        self.parts: dict[torch.Tensor, Layout] = {}
        self.before = 0

    def layout(self, *segments: int) -> Layout:
        """The ranks' parts of a sequence of so many tokens in each segment."""
        return Layout(segments, self._shares)

    @property
    def spread(self) -> Layout | None:
        """What attends is spread like this; None while every rank has all of it."""
        return None if self._layouts is None else self._layouts[0]

    @spread.setter
    def spread(self, layout: Layout | None) -> None:
        self._layouts = None if layout is None else (_enough(layout), layout)

    def take(self, tensor: torch.Tensor, layout: Layout, dim: int = 1) -> torch.Tensor:
        """This rank's part of what has all tokens along `dim`.

        Raises:
            Unsuited: it has another number of them.
        """
        if tensor.shape[dim] != layout.total:
            raise Unsuited(f"a tensor of {tuple(tensor.shape)} has not {layout.total} tokens along {dim}")
        return layout.take(tensor, self.rank, dim)

    def gather(self, tensor: torch.Tensor, layout: Layout, dim: int = 1) -> torch.Tensor:
        """The whole, on every rank, of this rank's part."""
        whole = self._group.gather(tensor, dim, layout.lengths)
        return layout.join(torch.split(whole, layout.lengths, dim), dim) if len(layout.segments) > 1 else whole

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Attention in here is of each token to what every rank has whole, as a text."""
        return self._during(None)

    def among(self, queries: Layout, keys: Layout) -> contextlib.AbstractContextManager[None]:
        """Attention in here is of tokens that are spread like this, to tokens that may be spread in another way."""
        return self._during((_enough(queries), _enough(keys)))

    @contextlib.contextmanager
    def _during(self, layouts: tuple[Layout, Layout] | None) -> Iterator[None]:
        kept, self._layouts = self._layouts, layouts
        try:
            yield
        finally:
            self._layouts = kept

    def attention(self, func: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
                  mask: torch.Tensor | None = None, attn_precision: Any = None, skip_reshape: bool = False,
                  skip_output_reshape: bool = False, **kwargs: Any) -> torch.Tensor:
        """What `func`, one of ComfyUI's attention functions, makes of all ranks' tokens, for this rank's tokens.

        Args:
            q: (batch, tokens, heads * dim); (batch, heads, tokens, dim) with `skip_reshape`.
            k, v: likewise, or (batch, tokens, heads, dim); with `enable_gqa` their heads may be fewer.
            mask: as `func` wants it for the whole sequence.

        Returns:
            (batch, tokens, heads * dim); (batch, heads, tokens, dim) with `skip_output_reshape`.

        Raises:
            Unsuited: the tokens are not those of the layout.
            PeerLost: another rank did not take part.
        """
        func = functools.partial(func, attn_precision=attn_precision)
        if self._inside or self._layouts is None or self._group.world == 1:
            self.whole += not self._inside
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs)
        if not skip_reshape:
            q, k, v = (_by_head(tensor, q.shape[-1] // heads) for tensor in (q, k, v))
        queries, keys = self._layouts
        queries = queries if mask is None else self.parts.get(mask, queries)
        with self._pace.timed((queries.total, keys.total), q):
            out = self._exchanged(func, (queries, keys, keys), (q, k, v), heads, mask, kwargs)
        self.shared += 1
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def _exchanged(self, func: Attention, layouts: tuple[Layout, ...], qkv: tuple[torch.Tensor, ...], heads: int,
                   mask: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        """(batch, heads, this rank's tokens, dim) of each."""
        queries, mine = layouts[0], [layout.lengths[self.rank] for layout in layouts]
        whole = (0, self.before, self.before)
        if [tensor.shape[2] - length for tensor, length in zip(qkv, whole, strict=True)] != mine or qkv[0].shape[1] != heads:
            raise Unsuited(f"an attention of {[tuple(tensor.shape) for tensor in qkv]} has not {mine} tokens of {heads} heads")
        qkv = self._grouped(qkv)
        kept = [tensor[:, :, :length] for tensor, length in zip(qkv, whole, strict=True)]
        qkv = tuple(tensor[:, :, length:] for tensor, length in zip(qkv, whole, strict=True))
        mask, each = self.mask if mask is None else mask, heads // qkv[1].shape[1]
        lots = _lots(split(qkv[1].shape[1], self._shares), self._pace.lots)
        started = [self._to_heads(layouts, qkv, lot) for lot in lots]
        returned = []
        for lot, arrived in zip(lots, started, strict=True):
            own = range(lot[self.rank].start * each, lot[self.rank].stop * each)
            taken = arrived()
            if self.before:
                taken[1:] = [torch.cat([tensor[:, lot[self.rank].start:lot[self.rank].stop], rest], 2)
                             for tensor, rest in zip(kept[1:], taken[1:], strict=True)]
            out = self._own(func, taken, _of_heads(mask, heads, own), kwargs)
            parts = [queries.take(out, other, 2).contiguous() for other in range(self._group.world)]
            shapes = [(out.shape[0], len(theirs) * each, mine[0], out.shape[-1]) for theirs in lot]
            returned.append(self._group.all_to_all(parts, shapes))
        return torch.cat([part for of_rank in zip(*(back() for back in returned), strict=True) for part in of_rank], 1)

    def _to_heads(self, layouts: tuple[Layout, ...], qkv: tuple[torch.Tensor, ...],
                  lot: Sequence[range]) -> Callable[[], list[torch.Tensor]]:
        """Begins an exchange; what is returned waits, and has (batch, heads, all tokens, dim) of each of the three, of those
        heads of keys that are this rank's in the lot."""
        each = [tensor.shape[1] // qkv[1].shape[1] for tensor in qkv]
        parts = [torch.cat([tensor[:, heads.start * many:heads.stop * many].flatten()
                            for tensor, many in zip(qkv, each, strict=True)]) for heads in lot]
        shapes = [[(tensor.shape[0], len(lot[self.rank]) * many, length, tensor.shape[-1])
                   for tensor, many, length in zip(qkv, each, lengths, strict=True)]
                  for lengths in zip(*(layout.lengths for layout in layouts), strict=True)]
        sizes = [[math.prod(shape) for shape in three] for three in shapes]
        received = self._group.all_to_all(parts, [[sum(three)] for three in sizes])

        def arrived() -> list[torch.Tensor]:
            pieces = [[piece.view(shape) for piece, shape in zip(torch.split(part, size), three, strict=True)]
                      for part, size, three in zip(received(), sizes, shapes, strict=True)]
            return [layout.join(of_ranks, 2) for layout, of_ranks in zip(layouts, zip(*pieces, strict=True), strict=True)]

        return arrived

    def _own(self, func: Attention, whole: list[torch.Tensor], mask: torch.Tensor | None,
             kwargs: dict[str, Any]) -> torch.Tensor:
        q, k, v = whole
        if not q.shape[1]:
            return q.new_empty((q.shape[0], 0, q.shape[2], v.shape[-1]))
        if k.shape[1] == q.shape[1]:
            kwargs.pop("enable_gqa", None)
        self._inside = True
        try:
            return func(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, **kwargs)
        finally:
            self._inside = False

    def _grouped(self, qkv: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Queries stay with the keys that their group shares; keys are repeated where there are not enough for the ranks."""
        q, k, v = qkv
        group, rest = divmod(q.shape[1], k.shape[1])
        if rest or k.shape[1] != v.shape[1]:
            raise Unsuited(f"{q.shape[1]} heads of queries have {k.shape[1]} of keys and {v.shape[1]} of values")
        if group > 1 and k.shape[1] < self._group.world:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return q, k, v


def _enough(layout: Layout) -> Layout:
    if not all(layout.lengths):
        raise Unsuited(f"{layout.total} tokens are not enough for all workers")
    return layout


def _by_head(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """(batch, heads, tokens, dim), as a view."""
    return (tensor if tensor.ndim == 4 else tensor.view(*tensor.shape[:-1], -1, dim)).transpose(1, 2)


def _lots(counts: Sequence[int], many: int) -> list[list[range]]:
    """For each lot, which heads are whose."""
    starts = list(accumulate(counts, initial=0))
    by_rank = [[range(start + one, start + other) for one, other in pairwise(accumulate(split(count, [1.0] * many), initial=0))]
               for start, count in zip(starts, counts, strict=False)]
    return [list(lot) for lot in zip(*by_rank, strict=True)]


def _of_heads(mask: torch.Tensor | None, heads: int, own: range) -> torch.Tensor | None:
    """Some heads of a mask that has heads; any other is for all of them."""
    if mask is None or mask.ndim < 4 or mask.shape[1] == 1:
        return mask
    if mask.shape[1] != heads:
        raise Unsuited(f"a mask of {tuple(mask.shape)} is not of {heads} heads")
    return mask[:, own.start:own.stop]
