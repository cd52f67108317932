"""GGUF weights as the host's own quantised tensors, and the layers that compute with them."""
from __future__ import annotations

from typing import Any

LAYOUT = "ResidencyGGUF"


def is_gguf(value: Any) -> bool:
    """Whether a tensor holds GGUF blocks in our layout."""
    return getattr(value, "_layout_cls", None) == LAYOUT


def keeps_file_format(module: Any) -> bool:
    """Whether a module is one of our layers whose weight is not in the dtype that it computes in."""
    return bool(getattr(module, "keeps_file_format", False))
