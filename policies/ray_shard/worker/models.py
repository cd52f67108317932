"""Models in a worker: ComfyUI's own patcher applies what is patched, and places the weights."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sd
import torch
from comfy.patcher_extension import CallbacksMP

from ...chunking import Chunking
from ...models import ITSELF
from ..parcels import Parcel, unpack
from ..rebuilding import Pieces
from .homes import Home
from .patcher import Patcher
from .weights.owned import Owned

UNCUT = Chunking(1)
_HOMES = "residency.homes"  # names the callback


def cast_at_use(model: torch.nn.Module) -> None:
    """Prepares what ComfyUI with dynamic VRAM leaves in the file's dtype, and casts, for the classic patcher, which does not.

    Layers cast at use; what no layer of ComfyUI's holds, some small parameters and buffers, is cast here.
    """
    for layer in model.modules():
        for leaf, value in [*layer._parameters.items(), *layer._buffers.items()]:
            wanted = getattr(layer, f"{leaf}_comfy_model_dtype", None)
            if value is not None:
                vars(value).pop("_model_dtype", None)  # the host's note of what its pages hold
            if value is None or wanted in (None, value.dtype):
                continue
            if hasattr(layer, "comfy_cast_weights") and leaf in ("weight", "bias"):
                vars(layer)["comfy_cast_weights"] = True
            elif leaf in layer._parameters:
                layer._parameters[leaf] = torch.nn.Parameter(value.detach().to(wanted), requires_grad=False)
            else:
                layer._buffers[leaf] = value.to(wanted)


class Model:
    """One model, with whatever is patched now.

    Args:
        model: as it was built.
        chunking: of its feed-forwards.

    Attributes:
        whole: why nothing of the last prediction was run in pieces, where it was to be.
    """

    def __init__(self, model: Any, device: torch.device, offload_device: torch.device, chunking: Chunking = UNCUT) -> None:
        cast_at_use(model)
        self._model = model
        self._base = Patcher(model, load_device=device, offload_device=offload_device)
        self._base.add_callback_with_key(CallbacksMP.ON_DETACH, _HOMES, self._taken_off)  # its clones have it too
        self._patcher = self._base
        self._chunking, self.whole = chunking, ""
        self._digest = ""
        self._hooks: Any = None
        self._placed: Any = None  # the patcher whose patches are in the weights now
        self._loaded = 0  # bytes on the device, when it was placed
        self._owned: Owned | None = None  # what the weights are shared out by
        self._homes = {name: Home(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
                       for name, _ in model.named_parameters(remove_duplicate=False)}

    def patch(self, digest: str, parcel: Parcel, sent: Sequence[Pieces] = ()) -> None:
        """Takes a patcher's state; the weights are patched when they are placed."""
        state = self._open(parcel, sent)
        patcher = self._base.clone()
        hooks = state.pop("current_hooks")
        for name, value in state.items():
            setattr(patcher, name, value)
        self._patcher.patch_hooks(None)  # the clones share what undoes it
        self._digest, self._hooks, self._patcher = digest, hooks, patcher

    def _open(self, parcel: Parcel, sent: Sequence[Pieces]) -> dict[str, Any]:
        return dict(unpack(parcel, known=self._named(), sent=sent))

    def must_have(self, digest: str) -> None:
        """
        Raises:
            KeyError: something else is patched.
        """
        if self._digest != digest:
            raise KeyError(f"patched is {self._digest!r}, not {digest!r}")

    @property
    def diffusion_model(self) -> Any:
        """What the tokens flow through."""
        return self._model.diffusion_model

    def predict(self, arguments: dict[str, Any], owned: Owned | None = None, apart: bool = True) -> torch.Tensor:
        """
        Args:
            owned: how the weights are shared out among the workers, which all predict at the same time.
            apart: rows may be predicted one after the other.
        """
        x = arguments.pop("x")
        if self._owned is not owned or (owned is not None and not self._is_whole()):
            self.release()
        if not self._is_whole():
            self._place(self._model.memory_required([x.shape[0], *x.shape[1:]]), owned)
        return self._apply(x, arguments) if owned is None else owned.run(self._apply, x, arguments, apart)

    def _apply(self, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        # What a subclass does before is done in the host's process.
        with self._chunking.during(self._model) as tally:
            answer: torch.Tensor = comfy.model_base.BaseModel._apply_model(self._model, x, **arguments)
        self.whole = tally.ineffective()
        return answer

    def _is_whole(self) -> bool:
        """Whether what is patched now was placed, and is all there: ComfyUI takes it off the device for another, or a part."""
        patcher = self._patcher
        here = any(one.model is patcher for one in comfy.model_management.current_loaded_models)
        return self._placed is patcher and here and patcher.loaded_size() >= self._loaded

    def _place(self, needed: float, owned: Owned | None = None) -> None:
        """Also what ComfyUI has taken off: as much as there is room for now.

        Args:
            needed: bytes that are left free beside the weights.
        """
        patcher = self._placed = self._patcher
        self._owned = owned

        def load(beside: int) -> None:
            comfy.model_management.load_models_gpu([patcher], memory_required=needed + beside)

        try:
            for name in {name for patches in patcher.hook_patches.values() for name in patches} & set(self._homes):
                self._homes[name].leave()
            if owned is None:
                load(0)
            else:
                owned.place(patcher, load)
            self._loaded = patcher.loaded_size()
            patcher.pre_run()
            patcher.patch_hooks(self._hooks)
        except BaseException:
            self.release()  # a part of it may be there
            raise

    def release(self) -> None:
        """The weights leave the device, and nothing is copied: each is what it was before."""
        patcher, self._placed = self._placed, None
        owned, self._owned = self._owned, None
        if patcher is None:
            return
        if owned is not None:
            owned.drop()
        patcher.patch_hooks(None)
        for name, home in self._homes.items():
            if name not in patcher.backup:
                home.come_back()  # before the host moves it
        patcher.detach()  # and the rest
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [one for one in loaded if one.model is not patcher]

    def _taken_off(self, patcher: Any, unpatched: bool) -> None:
        """Drops what ComfyUI copied off the device, unless it only made way for another patcher of this model."""
        if unpatched:
            for home in self._homes.values():
                home.come_back()

    def _named(self) -> Mapping[str, Any]:
        return {"": self._model, **dict(self._model.named_modules())}


class Vae(Model):
    """The model of a VAE, and a VAE made of the attributes of the host's."""

    def __init__(self, model: Any, device: torch.device, offload_device: torch.device, chunking: Chunking = UNCUT) -> None:
        super().__init__(model, device, offload_device, chunking)
        self._device = device
        self._vae: Any = None
        self._room = 0.0  # bytes that were kept free for a tile when it was placed

    def _open(self, parcel: Parcel, sent: Sequence[Pieces]) -> dict[str, Any]:
        self._vae = object.__new__(comfy.sd.VAE)  # its attributes may refer to it
        state = super()._open(parcel, sent)
        vars(self._vae).update(state.pop("attributes"), patcher=self._base, device=self._device)
        return state

    def tile(self, function: Parcel, tile: torch.Tensor, room: float) -> torch.Tensor:
        """What the host's function gives for a tile. `room` is the host's estimate of what the largest one takes, in bytes."""
        if not self._is_whole() or room > self._room:
            self._place(room)
            self._room = room
        answer: torch.Tensor = unpack(function, known=self._named())(tile)
        return answer

    def _named(self) -> Mapping[str, Any]:
        return {**super()._named(), ITSELF: self._vae}


class Models:
    """All models of a worker, by the host's keys."""

    def __init__(self, device: torch.device, offload_device: torch.device, chunking: Chunking = UNCUT) -> None:
        self._device, self._offload_device, self._chunking = device, offload_device, chunking
        self._models: dict[str, Model] = {}

    def add(self, key: str, kind: str, parcel: Parcel, sent: Sequence[Pieces] = ()) -> None:
        """`kind` is `policies.models.Remote.kind`."""
        made = Vae if kind == "vae" else Model
        self._models[key] = made(unpack(parcel, sent=sent), self._device, self._offload_device, self._chunking)

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
