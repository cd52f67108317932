"""Weights in the host's own scaled fp8, in a file beside a GGUF file: one set of layers is made for both."""
from __future__ import annotations

from typing import Any

import torch


def unscaled(state_dict: dict[str, Any], key: str, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight; dense where it is in scaled fp8, as another text encoder beside a GGUF file may be.

    Raises:
        ValueError: it is quantised in another way of the host's own, which these layers do not know.
    """
    value: torch.Tensor | None = state_dict.get(key)
    scale = state_dict.get(f"{key}_scale")
    if value is None or scale is None:
        return value
    if scale.numel() != 1 or not value.dtype.is_floating_point:
        raise ValueError(f"{key} is in a format that cannot be loaded together with a GGUF file. Take both in GGUF, or none")
    dense: torch.Tensor = (value.float() * scale.float()).to(dtype)
    return dense
