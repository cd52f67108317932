"""What is computed on a device: sampling, text encodings, a VAE's work. Where that runs out of memory, a policy may repeat it.

Sampling steps are in `sampling.py`. Packs may take part in a step and count steps as they do; such a step is not repeated
alone, the sampling that it is part of is. What a sampler draws at random it draws outside of its steps.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..policies.computing import Compute, ComputeAll, ComputeImage, ComputeStep, ComputeTiles, IgnoreError
from .call import HostCall
from .host import Memory
from .registry import Hook
from .seam import Seam
from .weights import PatcherWeights

Kind = TypeVar("Kind", bound=Compute)


def _compute(kind: type[Kind], what: str, patcher: Any) -> Kind | None:
    """None on the CPU, whose memory is another matter, and for an object of a pack's that stands for a patcher."""
    device = getattr(patcher, "load_device", None)
    if device is None or device.type == "cpu" or not hasattr(patcher, "partially_unload"):
        return None
    return kind(what, PatcherWeights(patcher), device, rewinder(device))


def rewinder(device: torch.device) -> Callable[[], None]:
    """Puts the random numbers of the CPU and of a device back to where they are now."""
    here = torch.get_rng_state()
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "get_rng_state"):
        return lambda: torch.set_rng_state(here)
    where = () if device.type == "mps" else (device,)
    there = module.get_rng_state(*where)

    def rewind() -> None:
        torch.set_rng_state(here)
        module.set_rng_state(there, *where)

    return rewind


def _all(call: HostCall) -> ComputeAll | None:
    return _compute(ComputeAll, "sampling", call["model"])


def _guided(call: HostCall) -> ComputeAll | None:
    return _compute(ComputeAll, "sampling", getattr(call.instance, "model_patcher", None))


def _of(kind: type[Kind], what: str) -> Callable[[HostCall], Kind | None]:
    """For methods of the host's CLIP and VAE."""
    return lambda call: _compute(kind, what, getattr(call.instance, "patcher", None))


def _ignored(call: HostCall) -> IgnoreError | None:
    """Where the host's LoRA arithmetic, and attention of packs, catch all errors they say so in the `except` block."""
    error = sys.exc_info()[1]
    return IgnoreError(error) if error is not None and Memory().is_oom(error) else None


def _vae(name: str, optional: bool = False) -> Hook:
    return Hook(Seam("comfy.sd", f"VAE.{name}", optional=optional), ComputeTiles, lambda call: ComputeTiles())


HOOKS = (
    Hook(Seam("comfy.sample", "sample", ("model",)), ComputeAll, _all),
    Hook(Seam("comfy.sample", "sample_custom", ("model",)), ComputeAll, _all),
    Hook(Seam("comfy.samplers", "CFGGuider.sample"), ComputeAll, _guided),
    Hook(Seam("comfy.sd", "CLIP.encode_from_tokens_scheduled"), ComputeAll, _of(ComputeAll, "text encoding")),
    Hook(Seam("comfy.sd", "CLIP.encode_from_tokens"), ComputeStep, _of(ComputeStep, "a text encoding")),
    Hook(Seam("comfy.sd", "CLIP.generate"), ComputeStep, _of(ComputeStep, "text generation")),
    Hook(Seam("comfy.sd", "VAE.decode"), ComputeImage, _of(ComputeImage, "a VAE decode")),
    Hook(Seam("comfy.sd", "VAE.encode"), ComputeImage, _of(ComputeImage, "a VAE encode")),
    Hook(Seam("comfy.sd", "VAE.decode_tiled"), ComputeStep, _of(ComputeStep, "a tiled VAE decode")),
    Hook(Seam("comfy.sd", "VAE.encode_tiled"), ComputeStep, _of(ComputeStep, "a tiled VAE encode")),
    *(_vae(f"{way}_tiled_{kind}") for way in ("decode", "encode") for kind in ("", "1d", "3d")),
    *(_vae(f"_{way}_tiled_owned", optional=True) for way in ("decode", "encode")),
    Hook(Seam("logging", "error", ("msg",)), IgnoreError, _ignored),
)
