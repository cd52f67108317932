"""GGUF files as state dicts: numbers are the mapping, blocks are the host's quantised tensors over it.

A text encoder's tensors get the names that the host looks for, and its vocabulary where the host has none.
"""
from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import torch

from ...telemetry import emit
from ..files import quants
from ..files.bank import Lease
from ..files.gguf_file import PLAIN, GGUFFile
from ..files.gguf_header import GGUFError
from ..files.identity import Identity
from ..host import Formats, Reading
from . import gguf_mmproj, gguf_text, gguf_tokenizer
from .gguf_mmproj import Open
from .gguf_text import Target

__all__ = ["GGUFError", "GGUFFile", "locate", "unavailable", "weights"]


def unavailable(formats: Formats) -> str | None:
    """Why GGUF files cannot be opened here; None where they can."""
    if importlib.util.find_spec("gguf") is None:
        return "the package gguf is missing: pip install gguf"
    return formats.no_gguf()


def weights(lease: Lease, formats: Formats, lease_of: Open | None = None) -> dict[str, Any]:
    """The state dict of a GGUF file, without a copy of its blocks.

    Args:
        lease_of: opens a file beside it, with the half of a text encoder that takes images.

    Raises:
        GGUFError: it lacks what this architecture needs.
    """
    file = lease.gguf
    assert file is not None
    state_dict = {}
    types: Counter[str] = Counter()
    targets = gguf_text.targets(file.header)
    for name, tensor in lease.tensors.items():
        kind = file.kind(name)
        plain = kind in PLAIN
        target = Target(name) if targets is None else targets.get(name)
        if target is not None:
            state_dict[target.key] = target.of_numbers(tensor) if plain else _blocks(file, name, tensor, target, formats)
        types[str(tensor.dtype).removeprefix("torch.") if plain else quants.KINDS[kind].name] += tensor.nbytes
    if targets is not None:
        state_dict |= gguf_tokenizer.of(file.header)
        if lease_of is not None:
            state_dict |= gguf_mmproj.of(file.header, formats, lease_of)
    emit("gguf.read", file=lease.file.name, architecture=file.header.architecture,
         header_seconds=file.header.seconds if lease.fresh else 0.0, types_bytes=dict(types))
    return state_dict


def locate(lease: Lease, reading: Reading) -> None:
    """Tells a host that reads files straight to the device where the tensors are.

    Raises:
        OSError: the file is gone.
    """
    assert lease.gguf is not None
    file = open(lease.file.path, "rb")  # noqa: SIM115  the tensors keep it
    if Identity.of(file) != lease.file.identity:  # replaced since: what is mapped is what was asked for
        file.close()
        return
    for name, tensor in lease.tensors.items():
        if tensor.numel():
            reading.locate(tensor, file, lease.gguf.offset(name))


def _blocks(file: GGUFFile, name: str, tensor: torch.Tensor, target: Target, formats: Formats) -> torch.Tensor:
    kind, shape = file.kind(name), file.shape(name)
    if target.added:
        return target.of_numbers(quants.dequantize(tensor, kind, shape, torch.float32))
    return formats.gguf(tensor, kind, shape) if target.heads is None else formats.gguf(tensor, kind, shape, target.heads)
