"""GGUF files that a pack's node is about to open: as the host's own node would, unless the pack knows more of them."""
from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

from ...telemetry import emit, log
from ..files import gguf_header, quants
from ..files.gguf_file import PLAIN
from ..files.gguf_header import GGUFError
from ..policy import Decision, Proceed
from ..requests import OpenModel
from . import gguf_text

# What tools write as a text encoder's architecture when they keep the host's names, and put nothing beside the weights.
_HOSTS_NAMES = ("clip", "pig")


def decide(request: OpenModel) -> Decision:
    """How the files are opened, and why."""
    names = ", ".join(os.path.basename(path) for path in request.paths)
    for path in request.paths:
        reason = foreign(path, request.text_encoder) if path.lower().endswith(".gguf") else None
        if reason is not None:
            return Decision(f"{names}: left to the pack, {reason}", partial(_leave, reason))
    return Decision(f"{names}: opened as the stock loader opens them", partial(_stock, request))


def _leave(reason: str, proceed: Proceed) -> Any:
    emit("policy.declined", policy="zero_copy", reason=f"left to the pack, {reason}")
    return proceed()


def _stock(request: OpenModel, proceed: Proceed) -> Any:
    for name, value in request.superseded.items():
        log.warning("[residency] %s = %s is superseded: blocks become dense in the dtype that the layer computes in, "
                    "and a LoRA is added where the weight is used", name, value)
    return proceed(replace(request, stock=True))


def foreign(path: str, text_encoder: bool) -> str | None:
    """What there is in a GGUF file that we would read otherwise than a pack, or not at all."""
    try:
        header = gguf_header.of(path)
        ours = not text_encoder or gguf_text.targets(header) is not None or header.architecture in _HOSTS_NAMES
    except (GGUFError, OSError) as error:
        return str(error)
    kinds = {tensor.kind for tensor in header.tensors.values()} - PLAIN.keys() - quants.KINDS.keys()
    if kinds:
        return f"{os.path.basename(path)} has tensors of the types {sorted(kinds)}"
    if header.architecture is None:  # files of stable-diffusion.cpp have other shapes too
        return f"{os.path.basename(path)} does not say what it is a model of"
    return None if ours else f"{os.path.basename(path)} is a text encoder of the kind {header.architecture}"
