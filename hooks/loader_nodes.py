"""Nodes of packs that read `.gguf` files by themselves and hand the host state dicts.

They are found by what they do, not by name: a V1 node that returns a MODEL or a CLIP, and that calls the host's function which
makes one from state dicts. Packs are loaded after us, so they are looked for before each prompt.

Left alone are nodes of the newer API, and classes that were made inside a function, which cannot be found again by name. What
those open keeps its mapping (`policies/files/subclasses.py`).
"""
from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any

import comfy.sd
import folder_paths
import nodes
import torch

from ..policies.requests import OpenModel
from .call import HostCall
from .registry import Hook
from .seam import Seam

# The host's options for what a user may choose as device.
_DEVICES: dict[Any, dict[str, Any]] = {
    None: {}, "cpu": {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}}


@dataclass(frozen=True)
class _Kind:
    """What a node may load.

    Attributes:
        returns: the type of its only output.
        ends_in: the host's function that makes one from state dicts.
        folders: where its files lie.
        most: as many files can make one.
    """

    returns: str
    ends_in: str
    folders: tuple[str, ...]
    most: int


_MODEL = _Kind("MODEL", "load_diffusion_model_state_dict", ("diffusion_models", "unet_gguf", "model_gguf"), 1)
_CLIP = _Kind("CLIP", "load_text_encoder_state_dicts", ("text_encoders", "clip_gguf"), 4)


def found() -> Iterator[Hook]:
    """A hook for each such function of a node class that is registered now."""
    for node in set(nodes.NODE_CLASS_MAPPINGS.values()):
        name = getattr(node, "FUNCTION", None)
        owner = next((kind for kind in getattr(node, "__mro__", ()) if name in vars(kind)), None)
        function = None if owner is None else inspect.unwrap(vars(owner)[name])
        # The outputs are looked at last: the newer API computes them, in the pack's own code.
        if owner is None or not isinstance(function, FunctionType) or inspect.iscoroutinefunction(function):
            continue
        kind = next((kind for kind in (_MODEL, _CLIP) if getattr(node, "RETURN_TYPES", None) == (kind.returns,)), None)
        can_be_found = owner.__module__ in sys.modules and "<locals>" not in owner.__qualname__
        if kind is not None and can_be_found and _calls(function, kind.ends_in, node):
            yield Hook(Seam(owner.__module__, f"{owner.__qualname__}.{name}"), OpenModel, partial(_translate, kind),
                       instead=_diffusion_model if kind is _MODEL else _text_encoder)


@cache
def _calls(function: FunctionType, name: str, node: type) -> bool:
    """Whether a node's function calls another, by itself or through methods of the node and functions of its module."""
    bodies = [(function.__code__, function.__globals__)]
    for code, names in bodies:  # which grows
        if name in code.co_names:
            return True
        found = [(each, names) for each in code.co_consts if isinstance(each, CodeType)]
        for called in code.co_names:
            method = inspect.getattr_static(node, called, None)
            other: Any = getattr(method, "__func__", method) or names.get(called)
            other = inspect.unwrap(other)
            if isinstance(other, FunctionType) and (method is not None or other.__module__ == names.get("__name__")):
                found.append((other.__code__, other.__globals__))
        bodies += [each for each in found if each not in bodies]
    return False


def _translate(kind: _Kind, call: HostCall) -> OpenModel | None:
    chosen = {name: value for name, value in call.arguments().items() if not _is_default(value)}
    files = [value for value in chosen.values() if _is_file(value)]
    paths = [path for path in (_path(file, kind.folders) for file in files) if path is not None]
    plain = all(isinstance(value, (str, int, float)) for value in chosen.values())  # or it does more than load
    gguf = any(file.lower().endswith(".gguf") for file in files)
    if not plain or not gguf or len(paths) < len(files) or len(files) > kind.most:
        return None
    options = _options({name: value for name, value in chosen.items() if value not in files}) if kind is _CLIP else {}
    if options.get("device") not in _DEVICES:
        return None
    superseded = {name: value for name, value in chosen.items() if value not in (*files, *options.values())}
    return OpenModel(tuple(paths), kind is _CLIP, options, superseded)


def _options(chosen: dict[str, Any]) -> dict[str, Any]:
    """What the host's own node offers too. Its type is one of the host's, by whatever name the pack has for the choice."""
    types = [value for name, value in chosen.items()
             if name == "type" or str(value).upper() in comfy.sd.CLIPType.__members__]
    return {"type": types[0] if types else None, "device": chosen.get("device")}


def _is_default(value: Any) -> bool:
    """Whether it is no choice; `*args` and `**kwargs` that nobody gave among them."""
    return value is None or value is False or (isinstance(value, (str, tuple, dict)) and value in ("", "default", (), {}))


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and (
        os.path.splitext(value)[1].lower() in {".gguf", *folder_paths.supported_pt_extensions})


def _path(name: str, folders: tuple[str, ...]) -> str | None:
    paths: list[Any] = [folder_paths.get_full_path(folder, name) for folder in folders
                        if folder in folder_paths.folder_names_and_paths]
    return next((path for path in paths if path is not None), None)


def _diffusion_model(request: OpenModel) -> tuple[Any, ...]:
    return (comfy.sd.load_diffusion_model(request.paths[0], model_options={}),)


def _text_encoder(request: OpenModel) -> tuple[Any, ...]:
    """As `CLIPLoader` and `DualCLIPLoader` do it."""
    types = comfy.sd.CLIPType
    clip_type = getattr(types, str(request.options["type"]).upper(), types.STABLE_DIFFUSION)
    return (comfy.sd.load_clip(ckpt_paths=list(request.paths), embedding_directory=folder_paths.get_folder_paths("embeddings"),
                               clip_type=clip_type, model_options=dict(_DEVICES[request.options["device"]])),)
