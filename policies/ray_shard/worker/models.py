"""Models in a worker: ComfyUI's own patcher applies what is patched, and places the weights."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import torch

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
        state = dict(unpack(parcel, known=self._named()))
        patcher = self._base.clone()
        hooks = state.pop("current_hooks")
        for name, value in state.items():
            setattr(patcher, name, value)
        self._patcher.patch_hooks(None)  # the clones share what undoes it
        self._digest, self._hooks, self._placed, self._patcher = digest, hooks, False, patcher

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


class Models:
    """All models of a worker, by the host's keys."""

    def __init__(self, device: torch.device, offload_device: torch.device) -> None:
        self._device, self._offload_device = device, offload_device
        self._models: dict[str, Model] = {}

    def add(self, key: str, parcel: Parcel) -> None:
        self._models[key] = Model(unpack(parcel), self._device, self._offload_device)

    def __getitem__(self, key: str) -> Model:
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
