"""What the host is about to compute on a device, as requests: what may run out of memory there, and be repeated."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .models import Remote
from .requests import Request
from .weights import Weights


@dataclass(frozen=True)
class Compute(Request):
    """Something is about to be computed. Nothing that it was given changes by it, so that it can be repeated.

    Attributes:
        what: it is, for the user to read.
        weights: of the model that computes it.
        rewind: puts torch's random numbers back to where they were when the host was called.
    """

    what: str
    weights: Weights
    device: torch.device
    rewind: Callable[[], None]


@dataclass(frozen=True)
class ComputeStep(Compute):
    """A sampling step, a text encoding, or a VAE's work in tiles is about to run."""

    repeats = 2


@dataclass(frozen=True)
class ComputeImage(Compute):
    """A VAE is about to encode or decode in one piece. Out of memory, the host would go on in tiles."""

    repeats = 2


@dataclass(frozen=True)
class ComputeAll(Compute):
    """Sampling, or a text encoding with all its schedules, is about to run from start to end."""

    repeats = 1


@dataclass(frozen=True)
class ComputeTiles(Request):
    """A VAE is about to work in tiles."""


@dataclass(frozen=True)
class ScaleTiles(Request):
    """A VAE's function is about to be asked for one tile of a tensor after another, to be blended. The answer is a tensor.

    Attributes:
        function: answers for a tile, (1, channels, ...); another one, in a changed request, is asked instead.
        tiles: the tiles that it will be asked for, in order, as views; none where they cannot be foretold.
        room: the host's estimate of the bytes that a tile of some shape takes beside the weights; 0 where it has none.
    """

    remote: Remote
    weights: Weights
    function: Callable[[torch.Tensor], torch.Tensor]
    tiles: Callable[[], Sequence[torch.Tensor]]
    room: Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class IgnoreError(Request):
    """The host is about to log that it ran out of memory, and to go on without what failed: a LoRA, say."""

    error: BaseException
