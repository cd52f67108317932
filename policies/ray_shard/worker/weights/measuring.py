"""What decides where weights are to lie: room on the device, and how fast bytes come from another worker, or from the file."""
from __future__ import annotations

import time
from collections import Counter
from typing import Any

import comfy.model_management as management
import torch

from ..group import Group
from ..tokens import Unsuited
from .units import units_of, weight_of

_SAMPLE = 4 * 2**20  # bytes of each rank
_FROM_FILE = 64 * 2**20  # bytes, or a little more
_SPARE = 1.1  # so many times a model's size is what ComfyUI frees for it


def link_of(group: Group, device: torch.device) -> float:
    """Bytes per second that come to each rank from the others. All ranks measure together."""
    sample = torch.zeros(_SAMPLE, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(2):  # connections are made at the first
        started = time.perf_counter()
        group.gather(sample, 0, [_SAMPLE] * group.world).cpu()
        seconds.append(time.perf_counter() - started)
    return _SAMPLE * (group.world - 1) / min(seconds)


def measure(model: torch.nn.Module, device: torch.device, link: float) -> dict[str, Any]:
    """
    Args:
        model: a diffusion model, which lies in its file.
        link: what `link_of` found.

    Returns:
        bytes: of the weights. room: for weights on the device, bytes. link, file: bytes per second. blocks: whether it has any
        that can be shared out. width: of its hidden states.
    """
    size, room = weight_of(model), _room(device)
    try:
        blocks = bool(units_of(model))
    except Unsuited:
        blocks = False
    return {"bytes": size, "room": room, "link": link, "file": _from_file(model, device) if size > room else 0.0,
            "blocks": blocks, "width": _width(model)}


def _room(device: torch.device) -> float:
    """What is free when no other model is there, less what ComfyUI keeps for computing. On the CPU weights are not copied."""
    if device.type == "cpu":
        return float("inf")
    ours = sum(one.model_loaded_memory() for one in management.current_loaded_models if one.device == device)
    return float((management.get_free_memory(device) + ours - management.minimum_inference_memory()) / _SPARE)


def _from_file(model: torch.nn.Module, device: torch.device) -> float:
    copied, started = 0, time.perf_counter()
    for parameter in model.parameters():
        copied += parameter.to(device, copy=True).nbytes
        if copied >= _FROM_FILE:
            break
    torch.zeros(1, device=device).cpu()  # what came before is done
    return copied / (time.perf_counter() - started)


def _width(model: torch.nn.Module) -> int:
    widths = Counter(parameter.shape[-1] for parameter in model.parameters() if parameter.ndim == 2)
    return widths.most_common(1)[0][0] if widths else 1
