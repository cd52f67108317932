"""Nodes of packs that read a `.gguf` by themselves and hand the host a state dict.

They are found by what they do, not by name: a V1 node whose function returns a MODEL and calls
`load_diffusion_model_state_dict`. Packs are loaded after us, so they are looked for before each prompt.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import comfy.sd
import folder_paths
import nodes

from ..policies.requests import OpenModel
from .call import HostCall
from .registry import Hook
from .seam import Seam

_LOADS = "load_diffusion_model_state_dict"
_FOLDERS = ("diffusion_models", "unet_gguf")


def found() -> Iterator[Hook]:
    """A hook for each such node class that is registered now."""
    for node in set(nodes.NODE_CLASS_MAPPINGS.values()):
        if getattr(node, "RETURN_TYPES", None) != ("MODEL",):
            continue
        name = getattr(node, "FUNCTION", None)
        owner = next((kind for kind in getattr(node, "__mro__", ()) if name in vars(kind)), None)
        code = getattr(vars(owner)[name], "__code__", None) if owner is not None else None
        if owner is not None and code is not None and _LOADS in code.co_names and owner.__module__ in sys.modules:
            yield Hook(Seam(owner.__module__, f"{owner.__qualname__}.{name}"), OpenModel, _translate, instead=_stock)


def _translate(call: HostCall) -> OpenModel | None:
    arguments = call.arguments()
    files = [value for value in arguments.values() if isinstance(value, str) and value.lower().endswith(".gguf")]
    path = _path(files[0]) if len(files) == 1 else None
    if path is None:
        return None
    chosen = {name: value for name, value in arguments.items() if value not in (None, False, "default", files[0])}
    return OpenModel(path, chosen)


def _stock(request: OpenModel) -> tuple[Any, ...]:
    return (comfy.sd.load_diffusion_model(request.path, model_options={}),)


def _path(name: str) -> str | None:
    paths: list[Any] = [folder_paths.get_full_path(folder, name) for folder in _FOLDERS
                        if folder in folder_paths.folder_names_and_paths]
    return next((path for path in paths if path is not None), None)
