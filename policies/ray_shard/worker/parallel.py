"""What ways of sharing an attention among ranks have in common: they stand where ComfyUI has an override."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .group import Exchange

Attention = Callable[..., torch.Tensor]


class Parallel:
    """
    Args:
        shares: of the work, one for each rank, in any unit; equal if left out.

    Attributes:
        shared: attention calls that were shared.
        whole: those that every rank computed whole.

    Raises:
        ValueError: the shares are not one non-negative number for each rank.
    """

    shared = whole = 0

    def __init__(self, group: Exchange, shares: Sequence[float] | None = None) -> None:
        self._shares = [1.0] * group.world if shares is None else [float(share) for share in shares]
        if len(self._shares) != group.world or min(self._shares) < 0 or not 0 < math.fsum(self._shares) < math.inf:
            raise ValueError(f"{group.world} ranks want as many shares, none negative and not all zero, not {self._shares}")
        self._group = group
        self._inside = False

    def over(self, theirs: Attention | None) -> Attention:
        """An override for an attention that already has one: theirs is asked on each rank, for that rank's heads."""
        if theirs is None:
            return self.attention
        return lambda func, *args, **kwargs: self.attention(functools.partial(theirs, func), *args, **kwargs)

    def attention(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What `func`, one of ComfyUI's attention functions, makes of the same arguments."""
        raise NotImplementedError
