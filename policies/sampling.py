"""A diffusion model at work, step by step, as requests: what may be computed in another process."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .computing import Compute
from .models import Remote
from .requests import Request
from .weights import Weights


@dataclass(frozen=True)
class SampleStep(Compute):
    """A sampling step is about to run: the model predicts for each conditioning. The answer is a list of tensors.

    Attributes:
        alone: no pack takes part in it, so that it may be repeated.
        remote: the model; None where it cannot be computed elsewhere.
        x: the latents, (batch, channels, ...), for which each conditioning is predicted.
        branches: the host's answer for one conditioning each, by its place in the answer, where these can be computed side by
            side; the others in such an answer are zero. Each may be called once, in any thread.
        run: what answers instead of the host's own function; it calls the branches.
    """

    repeats = 2
    alone: bool
    remote: Remote | None
    x: torch.Tensor
    branches: Callable[[], Mapping[int, Callable[[], list[torch.Tensor]]]]
    run: Callable[[], list[torch.Tensor]] | None = None


@dataclass(frozen=True)
class Predict(Request):
    """A diffusion model is about to predict for a batch of latents. The answer is a tensor of the latents' shape.

    Attributes:
        x: the latents, (batch, channels, ...).
        rest: the other arguments by the host's names: conditioning, ControlNet residuals, options.
        guests: the names of what packs have in it, which may look at the whole batch and keep a state of its own.
    """

    remote: Remote
    weights: Weights
    x: torch.Tensor
    rest: Mapping[str, Any]
    guests: tuple[str, ...]


@dataclass(frozen=True)
class BatchRoom(Request):
    """The host asks how many bytes a batch may take on a model's device. The answer is a number."""

    module: torch.nn.Module
