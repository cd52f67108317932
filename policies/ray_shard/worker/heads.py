"""Head-parallel attention: every rank runs the whole model on all tokens, and of each attention only its own heads.

Heads do not know of each other until they are put side by side, so this is exact, for any model, patch or mask. What is sent is
each attention's result, once to every other rank; what is saved is the attention's arithmetic, which grows with the square of
the tokens while the rest grows with their number: it pays for long sequences and a fast link. What a rank does between two
attentions is its own, and nobody compares it: ranks must hold the same model and be given the same call.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from .parallel import Attention, Parallel


def split(heads: int, shares: Sequence[float]) -> list[int]:
    """Heads for each rank, as near to its share as whole heads allow (the method of largest remainders)."""
    wanted = [heads * share / math.fsum(shares) for share in shares]
    got = [math.floor(want) for want in wanted]
    for rank in sorted(range(len(shares)), key=lambda rank: (got[rank] - wanted[rank], rank))[:heads - sum(got)]:
        got[rank] += 1
    return got


class HeadParallel(Parallel):
    """Shares attention calls among the ranks of a group; `attention` is an override for ComfyUI's `transformer_options`.

    Args:
        shares: of the heads, one for each rank, in any unit; equal if left out.

    Attributes:
        shared: attention calls of which this rank computed its heads only.
        whole: attention calls that every rank computed whole: those of one head, and of shapes that are not known here.

    Raises:
        ValueError: the shares are not one non-negative number for each rank.
    """

    def attention(self, func: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
                  mask: torch.Tensor | None = None, attn_precision: Any = None, skip_reshape: bool = False,
                  skip_output_reshape: bool = False, **kwargs: Any) -> torch.Tensor:
        """What `func`, one of ComfyUI's attention functions, makes of the same arguments.

        Args:
            q: (batch, tokens, heads * dim); (batch, heads, tokens, dim) with `skip_reshape`.
            k, v: likewise, or (batch, tokens, heads, dim); with `enable_gqa` their heads may be fewer.
            mask: (tokens, tokens), (batch, tokens, tokens), (batch, heads, tokens, tokens); any but the last may be 1.

        Returns:
            (batch, tokens, heads * dim); (batch, heads, tokens, dim) with `skip_output_reshape`.

        Raises:
            PeerLost: another rank did not take part.
        """
        func = functools.partial(func, attn_precision=attn_precision, skip_reshape=skip_reshape,
                                 skip_output_reshape=skip_output_reshape)
        if not skip_reshape:
            k, v = (tensor.flatten(2) if tensor.ndim == 4 and tensor.shape[2] == heads else tensor for tensor in (k, v))
        if self._inside:  # a call that an attention function makes itself
            return func(q, k, v, heads, mask=mask, **kwargs)
        if self._group.world == 1 or not _known(q, k, v, heads, mask, skip_reshape, bool(kwargs.get("enable_gqa"))):
            self.whole += 1
            return func(q, k, v, heads, mask=mask, **kwargs)
        counts = split(heads, self._shares)
        start = sum(counts[:self._group.rank])
        mine = range(start, start + counts[self._group.rank])
        width = v.shape[-1] if skip_reshape else v.shape[-1] // _heads(v, q.shape[-1] // heads, skip_reshape)
        if mine:
            out = self._own(func, q, k, v, heads, mask, mine, skip_reshape, kwargs)
        else:
            tokens = q.shape[2 if skip_reshape else 1]
            out = q.new_empty((q.shape[0], 0, tokens, width) if skip_output_reshape else (q.shape[0], tokens, 0))
        self.shared += 1
        if skip_output_reshape:
            return self._group.gather(out, 1, counts)
        return self._group.gather(out, 2, [count * width for count in counts])

    def _own(self, func: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None,
             mine: range, skip_reshape: bool, kwargs: dict[str, Any]) -> torch.Tensor:
        """The attention of this rank's heads alone."""
        fewer = _heads(k, q.shape[-1] // heads, skip_reshape)
        group = heads // fewer
        q = _take(q, heads, mine, skip_reshape)
        if group == 1 or (mine.start % group == 0 and mine.stop % group == 0):
            theirs = range(mine.start // group, mine.stop // group)
            k, v = (_take(tensor, fewer, theirs, skip_reshape) for tensor in (k, v))
        elif fewer > 1:  # these queries share keys with another rank's: each gets its key, and grouping is over
            k, v = (_repeat(tensor, fewer, mine, group, skip_reshape) for tensor in (k, v))
            kwargs = {name: value for name, value in kwargs.items() if name != "enable_gqa"}
        if mask is not None and mask.ndim == 4 and mask.shape[1] == heads:
            mask = mask[:, mine.start:mine.stop]
        self._inside = True
        try:
            return func(q, k, v, len(mine), mask=mask, **kwargs)
        finally:
            self._inside = False


def _heads(tensor: torch.Tensor, dim: int, skip_reshape: bool) -> int:
    """Of keys or values, which grouped queries share."""
    return tensor.shape[1] if skip_reshape else tensor.shape[-1] // dim


def _known(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None, skip_reshape: bool,
           grouped: bool) -> bool:
    """There are heads to share, and it is clear which part of each tensor is a head's."""
    if heads < 2 or not q.ndim == k.ndim == v.ndim == (4 if skip_reshape else 3):
        return False
    if mask is not None and not (mask.ndim < 4 or (mask.ndim == 4 and mask.shape[1] in (1, heads))):
        return False
    if skip_reshape:
        fewer = k.shape[1]
        return q.shape[1] == heads and v.shape[1] == fewer and (fewer in (1, heads) or (grouped and heads % fewer == 0))
    if q.shape[-1] % heads or k.shape[-1] != v.shape[-1] or k.shape[-1] % (dim := q.shape[-1] // heads):
        return False
    fewer = k.shape[-1] // dim
    return fewer == heads or (grouped and fewer > 0 and heads % fewer == 0)


def _take(tensor: torch.Tensor, heads: int, wanted: range, skip_reshape: bool) -> torch.Tensor:
    """A view of some heads."""
    if skip_reshape:
        return tensor[:, wanted.start:wanted.stop]
    dim = tensor.shape[-1] // heads
    return tensor[..., wanted.start * dim:wanted.stop * dim]


def _repeat(tensor: torch.Tensor, fewer: int, queries: range, group: int, skip_reshape: bool) -> torch.Tensor:
    """For each query's head a copy of the head that its group shares."""
    index = torch.arange(queries.start, queries.stop, device=tensor.device) // group
    if skip_reshape:
        return tensor.index_select(1, index)
    return tensor.reshape(*tensor.shape[:-1], fewer, -1).index_select(2, index).flatten(2)
