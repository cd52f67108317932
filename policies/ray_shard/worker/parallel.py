"""What ways of sharing an attention among ranks have in common: they stand where ComfyUI has an override."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Attention = Callable[..., torch.Tensor]


class Parallel:
    """
    Attributes:
        shared: attention calls that were shared.
        whole: those that every rank computed whole.
    """

    shared = whole = 0

    def over(self, theirs: Attention | None) -> Attention:
        """An override for an attention that already has one: theirs is asked on each rank, for that rank's heads."""
        if theirs is None:
            return self.attention
        return lambda func, *args, **kwargs: self.attention(functools.partial(theirs, func), *args, **kwargs)

    def attention(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What `func`, one of ComfyUI's attention functions, makes of the same arguments."""
        raise NotImplementedError
