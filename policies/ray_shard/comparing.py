"""How far the answers of two devices, or of two orders of summing, may be apart."""
from __future__ import annotations

from collections.abc import Iterable

import torch

# The largest difference, of the largest value, that another order of summing explains, by what is computed in.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}
_COARSE = 0.03


def tolerance(kinds: Iterable[torch.dtype]) -> float:
    """Weights and latents are summed in the coarsest of their dtypes, at best."""
    return max(_TOLERANCE.get(kind, _COARSE) for kind in kinds)


def difference(answer: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a part of the largest value; infinite where the shapes differ. NaN where only one side has one."""
    if answer.shape != expected.shape:
        return float("inf")
    answer, expected = answer.to(expected.device).float(), expected.float()
    return float((answer - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
