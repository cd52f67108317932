"""Models in a worker: ComfyUI's own patcher applies what is patched, and places the weights."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...models import ITSELF
from ..parcels import Parcel, unpack


class Model:
    """One model, with whatever is patched now.

    Args:
        model: as it was built.
        home: what its weights are when they are not on the device: a file's mapping, or what the host sent.
    """

    def __init__(self, model: Any, device: torch.device, offload_device: torch.device) -> None:
        self._model = model
        self._base = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload_device)
        self._patcher = self._base
        self._digest = ""
        self._placed = False
        self._homes = dict(model.named_parameters())

    def patch(self, digest: str, parcel: Parcel) -> None:
        """Takes a patcher's state; the weights are patched when they are placed."""
        state = self._open(parcel)
        patcher = self._base.clone()
        hooks = state.pop("current_hooks")
        for name, value in state.items():
            setattr(patcher, name, value)
        self._patcher.patch_hooks(None)  # the clones share what undoes it
        self._digest, self._hooks, self._placed, self._patcher = digest, hooks, False, patcher

    def _open(self, parcel: Parcel) -> dict[str, Any]:
        return dict(unpack(parcel, known=self._named()))

    def must_have(self, digest: str) -> None:
        """
        Raises:
            KeyError: something else is patched.
        """
        if self._digest != digest:
            raise KeyError(f"patched is {self._digest!r}, not {digest!r}")

    def predict(self, arguments: dict[str, Any]) -> torch.Tensor:
        x = arguments.pop("x")
        if not self._placed:
            needed = self._model.memory_required([x.shape[0], *x.shape[1:]])
            self._own(name for patches in self._patcher.hook_patches.values() for name in patches)
            comfy.model_management.load_models_gpu([self._patcher], memory_required=needed)
            self._patcher.pre_run()
            self._patcher.patch_hooks(self._hooks)
            self._placed = True
        # What a subclass does before is done in the host's process.
        answer: torch.Tensor = comfy.model_base.BaseModel._apply_model(self._model, x, **arguments)
        return answer

    def release(self) -> None:
        """The weights leave the device, and nothing is copied: each is what it was before."""
        if not self._placed:
            return
        self._placed = False
        patcher = self._patcher
        patcher.patch_hooks(None)
        for name, home in self._homes.items():
            owner, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(owner)
            if name not in patcher.backup and module._parameters[leaf].device.type != "cpu":
                module._parameters[leaf] = home
        patcher.detach()
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [one for one in loaded if one.model is not patcher]

    def _own(self, names: Iterable[str]) -> None:
        """Gives weights memory of their own: hooks write to them in place, and others see what is there."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(owner)
            if module._parameters.get(leaf) is self._homes.get(name):
                module._parameters[leaf] = torch.nn.Parameter(self._homes[name].clone(), requires_grad=False)

    def _named(self) -> Mapping[str, Any]:
        return {"": self._model, **dict(self._model.named_modules())}


class Vae(Model):
    """The model of a VAE, and a VAE made of the attributes of the host's."""

    def __init__(self, model: Any, device: torch.device, offload_device: torch.device) -> None:
        super().__init__(model, device, offload_device)
        self._device = device
        self._vae: Any = None
        self._room = 0.0  # bytes that were kept free for a tile when it was placed

    def _open(self, parcel: Parcel) -> dict[str, Any]:
        self._vae = object.__new__(comfy.sd.VAE)  # its attributes may refer to it
        state = super()._open(parcel)
        vars(self._vae).update(state.pop("attributes"), patcher=self._base, device=self._device)
        return state

    def tile(self, function: Parcel, tile: torch.Tensor, room: float) -> torch.Tensor:
        """What the host's function gives for a tile. `room` is the host's estimate of what the largest one takes, in bytes."""
        if not self._placed or room > self._room:
            comfy.model_management.load_models_gpu([self._patcher], memory_required=room)
            self._placed, self._room = True, room
        answer: torch.Tensor = unpack(function, known=self._named())(tile)
        return answer

    def _named(self) -> Mapping[str, Any]:
        return {**super()._named(), ITSELF: self._vae}


class Models:
    """All models of a worker, by the host's keys."""

    def __init__(self, device: torch.device, offload_device: torch.device) -> None:
        self._device, self._offload_device = device, offload_device
        self._models: dict[str, Model] = {}

    def add(self, key: str, kind: str, parcel: Parcel) -> None:
        """`kind` is `policies.models.Remote.kind`."""
        made = Vae if kind == "vae" else Model
        self._models[key] = made(unpack(parcel), self._device, self._offload_device)

    def __getitem__(self, key: str) -> Any:
        return self._models[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def release(self, key: str | None) -> None:
        for name, model in self._models.items():
            if key in (None, name):
                model.release()

    def remove(self, key: str) -> None:
        model = self._models.pop(key, None)
        if model is not None:
            model.release()
