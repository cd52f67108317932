"""Two models of a worker take turns on a simulated device that has no room for both: a program, which prints JSON.

By case, of each turn: whether the answer is that of a device which the model has for itself, or the error; how much of the
other model is on the device then; and whether it lies where it was built.
"""
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from residency.hooks.remote import RemoteModel, vae_remote_of
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker.models import Models

from . import tiny
from .loading import ROOT
from .server import MB, SIMULATED_NPU
from .vaes import taesd_vae

PARTS = {"all": 1.01, "a part": 0.5}  # of the other model, that has to go
KINDS = ("plain", "LoRA", "LoRA, cast at use", "scheduled LoRA", "VAE")
CASES = {f"{kind}, {part}": (kind, part) for kind in KINDS for part in PARTS}
_ROOM = 4096 * MB


def found(comfyui: Path) -> dict[str, dict[str, Any]]:
    """What the program prints with that ComfyUI.

    Raises:
        AssertionError: it fails; with what it says.
    """
    program = "from support import loading; loading.load(cpu=False); from support import evictions; evictions.main()"
    variables = {**os.environ, "COMFYUI_PATH": str(comfyui), "SIMNPU_MB": str(_ROOM // MB), "OMP_WAIT_POLICY": "PASSIVE",
                 "PYTHONPATH": os.pathsep.join([str(SIMULATED_NPU), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "tests", env=variables, text=True, capture_output=True,
                           timeout=240)
    assert not ended.returncode, ended.stderr
    found: dict[str, dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with torch.inference_mode():
        print(json.dumps({name: _take_turns(*case) for name, case in CASES.items()}))


def _take_turns(kind: str, part: str) -> dict[str, Any]:
    device = management.get_torch_device()
    models = Models(device, management.unet_offload_device())
    ask = {"one": _unet(models, "one", kind, 0, device),
           "two": _vae(models, "two", device) if kind == "VAE" else _unet(models, "two", kind, 5, device)}
    lying = {name: _places(models[name]) for name in ask}
    alone = {name: _alone(models, ask[name]) for name in ask}
    turns = []
    for name, other in (("one", "two"), ("two", "one")) * 2:
        mine, its = (models[each]._patcher for each in (name, other))
        _leave(int(management.minimum_inference_memory() + 1.1 * (mine.model_size() - mine.loaded_size())
                   - PARTS[part] * its.loaded_size()))
        try:
            answer: Any = torch.equal(ask[name]().cpu(), alone[name])
        except RuntimeError as error:
            answer = str(error)
        turns.append({"same": answer, "other": its.loaded_size() / its.model_size(),
                      "home": _places(models[other]) == lying[other]})
    models.release(None)
    return {"turns": turns, "back": {name: _places(models[name]) for name in ask} == lying,
            "left": len(management.current_loaded_models)}


def _alone(models: Models, ask: Callable[[], torch.Tensor]) -> torch.Tensor:
    _leave(_ROOM)
    answer = ask().cpu()
    models.release(None)
    return answer


def _leave(free: int) -> None:
    """So many bytes of the device, beside those that are used now."""
    import torch_npu

    torch_npu._sim.set_capacity(torch_npu._sim.stats(1)["used"][0] + free)


def _places(model: Any) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model._model.named_parameters()}


def _unet(models: Models, key: str, kind: str, seed: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """How it is asked."""
    patcher = tiny.patcher(seed)
    if "cast" in kind:
        for layer in patcher.model.modules():
            for leaf, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
                setattr(layer, f"{leaf}_comfy_model_dtype", value.dtype)
        patcher.model.double()
    models.add(key, RemoteModel.kind, pack(RemoteModel(patcher).as_built()))
    patched = tiny.with_lora(patcher) if kind.startswith("LoRA") else patcher
    if kind == "scheduled LoRA":
        patched, patched.current_hooks = tiny.hooked(patcher)
    remote = RemoteModel(patched)
    models[key].patch("", pack(remote.patches(), known=remote.known()))

    def ask() -> torch.Tensor:
        given = tiny.arguments()
        tensors = {name: value.to(device) for name, value in given.items() if isinstance(value, torch.Tensor)}
        answer: torch.Tensor = models[key].predict({**given, **tensors})
        return answer

    return ask


def _vae(models: Models, key: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """How it is asked."""
    vae = taesd_vae()
    vae.first_stage_model.float()
    remote: Any = vae_remote_of(vae)
    models.add(key, remote.kind, pack(remote.as_built()))
    models[key].patch("", pack(remote.patches(), known=remote.known()))
    decode = pack(vae.first_stage_model.decode, files=False, known=remote.known())
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)

    def ask() -> torch.Tensor:
        answer: torch.Tensor = models[key].tile(decode, latents, 0.0)
        return answer

    return ask
