"""A tensor worked on tile by tile, in `comfy.utils.tiled_scale_multidim`: where a VAE does so, others can compute the tiles.

The host asks its function for one tile after another and blends what it gets, so tiles that were computed elsewhere go in by
that function, and order and arithmetic of the blend are the host's own. Called once for each pass over an image.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import comfy.sd
import torch

from ..policies.computing import ScaleTiles
from .call import HostCall
from .registry import Hook
from .remote import vae_remote_of
from .seam import Seam
from .weights import PatcherWeights


def foretell(samples: torch.Tensor, tile: Sequence[int], overlap: int | Sequence[int]) -> list[torch.Tensor]:
    """The tiles that the host will ask its function for, as views, in its order: `tiled_scale_multidim`'s own arithmetic.

    Args:
        samples: (batch, channels, *as many as `tile` has).
        tile, overlap: along each of these, or one overlap for all; a tile that is no longer than its overlap gives none.
    """
    sizes = samples.shape[2:2 + len(tile)]
    overlaps: Sequence[int] = [overlap] * len(tile) if isinstance(overlap, int) else overlap
    if any(size > one and one <= over for size, one, over in zip(sizes, tile, overlaps, strict=True)):
        return []
    axes = [[(0, size)] if size <= one else
            [(start, min(one, size - start)) for start in range(0, size - over, one - over)]
            for size, one, over in zip(sizes, tile, overlaps, strict=True)]
    found = []
    for index in range(samples.shape[0]):
        for place in itertools.product(*axes):
            view = samples[index:index + 1]
            for dimension, (start, length) in enumerate(place, 2):
                view = view.narrow(dimension, start, length)
            found.append(view)
    return found


def _scale(call: HostCall) -> ScaleTiles | None:
    function, samples = call["function"], call["samples"]
    vae = _vae_of(function)
    remote = vae_remote_of(vae)
    if remote is None:
        return None
    tile, overlap = tuple(call["tile"]), call["overlap"]
    return ScaleTiles(remote, PatcherWeights(vae.patcher), function, lambda: foretell(samples, tile, overlap),
                      _room(vae, call["downscale"], call["upscale_amount"]))


def _vae_of(function: Any) -> Any:
    """The VAE that a function was made for: its tiles are computed by a closure over it. None for upscalers and all others."""
    cells = getattr(function, "__closure__", None) or ()
    found = [value for cell in cells if isinstance(value := _contents(cell), comfy.sd.VAE)]
    return found[0] if len(found) == 1 else None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned to it yet
        return None


def _room(vae: Any, downscale: bool, amount: Any) -> Callable[[Sequence[int]], float]:
    """The host's estimate of the bytes that a tile of this shape takes; what makes it smaller is an encoder."""
    encodes = downscale or (isinstance(amount, (int, float)) and amount < 1)
    estimate = vae.memory_used_encode if encodes else vae.memory_used_decode

    def room(shape: Sequence[int]) -> float:
        try:
            return float(estimate(shape, vae.vae_dtype))
        except IndexError:  # some audio is cut as if it had one dimension less; the host keeps its least room free then
            return 0.0

    return room


HOOKS = (
    Hook(Seam("comfy.utils", "tiled_scale_multidim", ("samples", "function", "tile", "overlap", "upscale_amount", "downscale")),
         ScaleTiles, _scale, lambda request: {"function": request.function}),
)
