"""Models being loaded from files: the functions of `comfy.sd` where the stock loaders and many packs' end.

There is no `comfy.sd.load_vae`, so the stock VAE node itself is the door. A model that the host wants for itself alone (a
classic stand-in for a dynamic one, a copy for another GPU) is not asked about: see `kept.Reload`.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import folder_paths
import nodes
import torch

from ..policies.files.bank import Bank
from ..policies.models import Recipe
from ..policies.requests import FindFile, ListFiles, LoadModel
from . import devices, kept
from .answers import parts_of, remember
from .call import HostCall
from .registry import Hook
from .seam import Seam

_WEIGHT_DTYPES: dict[tuple[Any, bool], str] = {
    (None, False): "default", (torch.float8_e4m3fn, False): "fp8_e4m3fn", (torch.float8_e4m3fn, True): "fp8_e4m3fn_fast",
    (torch.float8_e5m2, False): "fp8_e5m2"}


def hooks(bank: Bank) -> tuple[Hook, ...]:
    """The hooks of this file; `bank` tells which weights are a file's mapping."""

    def hook(module: str, path: str, needs: tuple[str, ...], read: Callable[[HostCall], LoadModel | None]) -> Hook:
        return Hook(Seam(module, path, needs), LoadModel, read,
                    report=lambda call, request, answer, seconds: remember(answer, request.paths))

    def request(kind: str, paths: tuple[str, ...], options: Mapping[str, Any], recipe: Recipe | None) -> LoadModel | None:
        if kept.wanted_alone() or options.get("disable_dynamic"):
            return None
        options = {**options, "devices": devices.chosen()}
        return LoadModel(kind, paths, options, partial(kept.keep, bank=bank), recipe, parts_of)

    def diffusion_model(call: HostCall) -> LoadModel | None:
        options = dict(call.arguments())
        path = str(options.pop("unet_path"))
        return request("diffusion model", (path,), options, _diffusion_model(path, options["model_options"]))

    def checkpoint(call: HostCall) -> LoadModel | None:
        options = dict(call.arguments())
        path = str(options.pop("ckpt_path"))
        return request("checkpoint", (path,), options, _checkpoint(path, options))

    def text_encoder(call: HostCall) -> LoadModel | None:
        options = dict(call.arguments())
        paths = tuple(map(str, options.pop("ckpt_paths")))
        return request("text encoder", paths, options, _text_encoder(paths, options["clip_type"], options["model_options"]))

    def vae(call: HostCall) -> LoadModel | None:
        name = call["vae_name"]
        paths = vae_files(name)
        return request("VAE", paths, {"name": name if len(paths) > 1 else ""}, Recipe("vaes", (name,))) if paths else None

    return (
        hook("comfy.sd", "load_diffusion_model", ("unet_path", "model_options", "disable_dynamic"), diffusion_model),
        hook("comfy.sd", "load_checkpoint_guess_config", ("ckpt_path", "disable_dynamic"), checkpoint),
        hook("comfy.sd", "load_clip", ("ckpt_paths", "clip_type", "model_options", "disable_dynamic"), text_encoder),
        hook("nodes", "VAELoader.load_vae", ("vae_name",), vae),
        *_SEARCHES,
    )


def _folder(call: HostCall) -> str:
    folder: str = folder_paths.map_legacy(str(call["folder_name"]))
    return folder


_SEARCHES = (
    Hook(Seam("folder_paths", "get_filename_list", ("folder_name",)), ListFiles, lambda call: ListFiles(_folder(call))),
    Hook(Seam("folder_paths", "get_full_path", ("folder_name", "filename")), FindFile,
         lambda call: FindFile(_folder(call), str(call["filename"]))),
)


def vae_files(name: str) -> tuple[str, ...]:
    """The files that the stock node reads for a name of its list; none for what is made of no file."""
    loader = nodes.VAELoader
    if name in loader.image_taes:
        approx = folder_paths.get_filename_list("vae_approx")
        found = [file for part in ("encoder", "decoder") for file in approx if file.startswith(f"{name}_{part}.")]
        paths = [folder_paths.get_full_path("vae_approx", file) for file in found]
    else:
        folder = "vae_approx" if os.path.splitext(name)[0] in loader.video_taes else "vae"
        paths = [folder_paths.get_full_path(folder, name)]
    return tuple(path for path in paths if path is not None)


def _name(folder: str, path: str) -> str | None:
    """A file as the list of its folder calls it."""
    for base in folder_paths.get_folder_paths(folder):
        name = os.path.relpath(path, base) if os.path.abspath(path).startswith(os.path.abspath(base) + os.sep) else None
        if name is not None:
            return name
    return None


def _diffusion_model(path: str, options: Mapping[str, Any]) -> Recipe | None:
    name = _name("diffusion_models", path)
    dtype = _WEIGHT_DTYPES.get((options.get("dtype"), bool(options.get("fp8_optimizations"))))
    if name is None or dtype is None or set(options) - {"dtype", "fp8_optimizations"}:
        return None
    return Recipe("diffusion_models", (name,), weight_dtype=dtype)


def _checkpoint(path: str, options: Mapping[str, Any]) -> Recipe | None:
    name = _name("checkpoints", path)
    stock = {"output_vae": True, "output_clip": True, "output_clipvision": False, "output_model": True,
             "model_options": {}, "te_model_options": {}}
    return None if name is None or any(options.get(key) != value for key, value in stock.items()) \
        else Recipe("checkpoints", (name,))


def _text_encoder(paths: tuple[str, ...], kind: Any, options: Mapping[str, Any]) -> Recipe | None:
    names = [_name("text_encoders", path) for path in paths]
    cpu = {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    if options not in ({}, cpu) or not 1 <= len(names) <= 4:
        return None
    found = tuple(name for name in names if name is not None)
    return Recipe("text_encoders", found, kind.name.lower(), "cpu" if options else "default") \
        if len(found) == len(names) else None
