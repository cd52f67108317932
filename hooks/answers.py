"""What a loader's answer is made of: a model, a text encoder, a VAE, or a tuple of them."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..policies.models import Part


class Origin(NamedTuple):
    """What a model was loaded as, and from which files."""

    component: str
    paths: tuple[str, ...]


_COMPONENTS = {"diffusion model": "diffusion_model", "text encoder": "text_encoder", "VAE": "vae"}
_origins: WeakKeyDictionary[torch.nn.Module, Origin] = WeakKeyDictionary()


def patcher_of(part: Any) -> Any:
    """The patcher that a part is, or has; None for what has none."""
    return part if hasattr(part, "model_patches_to") else getattr(part, "patcher", None)


def kind_of(part: Any) -> str:
    """As `devices` calls it. What is none of the three has the devices of a diffusion model."""
    patcher = patcher_of(part)
    return "text encoder" if patcher.is_clip else "VAE" if hasattr(part, "first_stage_model") else "diffusion model"


def parts_of(answer: Any) -> Sequence[Part]:
    """The models in an answer."""
    members = answer if isinstance(answer, tuple) else (answer,)
    return [Part(_COMPONENTS[kind_of(part)], patcher_of(part).model, int(patcher_of(part).model_size()), partial(_run_on, part))
            for part in members if patcher_of(part) is not None]


def remember(answer: Any, paths: tuple[str, ...]) -> None:
    """Notes where the models in a loader's answer come from. Clones share the module, so they are known too."""
    for part in parts_of(answer):
        _origins[part.module] = Origin(part.component, paths)


def origin_of(patcher: Any) -> Origin:
    """Of a model that came past no loader that we see: what its patcher says, and no files."""
    return _origins.get(patcher.model) or Origin("text_encoder" if patcher.is_clip else "", ())


def _run_on(part: Any, device: str) -> None:
    patcher = patcher_of(part)
    patcher.load_device = torch.device(device)
    if hasattr(part, "first_stage_model"):
        part.device = patcher.load_device
