"""What the host is about to do, in plain values; its models are `weights.Weights`, tensors and modules are torch's own."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .models import Kept, Part, Recipe, Remote
from .weights import Weights


class Request:
    """The base of all requests: something the host is about to do.

    Attributes:
        repeats: how often the host may be asked again, each time after its device ran out of memory.
    """

    __slots__ = ()
    repeats: ClassVar[int] = 0


@dataclass(frozen=True)
class LoadModel(Request):
    """A loader is about to make a model from files. The answer is the host's own object.

    Attributes:
        options: everything else that the result depends on, the host's present devices too.
        keep: makes of the host's answer something that can be lent again; None where it cannot.
        parts: the models in the host's answer.
    """

    kind: str
    paths: tuple[str, ...]
    options: Mapping[str, Any]
    keep: Callable[[Any], Kept | None]
    recipe: Recipe | None = None
    parts: Callable[[Any], Sequence[Part]] = lambda answer: ()


@dataclass(frozen=True)
class ListFiles(Request):
    """The files of a models folder are about to be listed. The answer is a list of names."""

    folder: str


@dataclass(frozen=True)
class FindFile(ListFiles):
    """A file of a models folder is looked for by its name. The answer is its path, or None."""

    name: str


@dataclass(frozen=True)
class ReadWeights(Request):
    """A weight file is about to be read. The answer is a state dict, or (state dict, metadata)."""

    path: str
    with_metadata: bool
    on_cpu: bool


@dataclass(frozen=True)
class OpenModel(Request):
    """A pack's node is about to open files in its own way, GGUF files among them.

    Attributes:
        paths: of the files that make one model, in the order in which the user chose them.
        text_encoder: whether they make one, or else a diffusion model.
        options: what the user chose that the host's own node offers too, opaque here.
        superseded: what the user chose besides, by its names on the node.
        stock: whether to open them as the host's own node would.
    """

    paths: tuple[str, ...]
    text_encoder: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    superseded: Mapping[str, Any] = field(default_factory=dict)
    stock: bool = False


@dataclass(frozen=True)
class BuildModel(Request):
    """A state dict is about to become one or several models. The answer is the host's own objects.

    Attributes:
        options: the host's options for the model, opaque here.
        gguf: whether GGUF weights are among the tensors.
        bind_gguf: whether to build the model of layers that compute with them.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gguf: bool = False
    bind_gguf: bool = False


@dataclass(frozen=True)
class FillModule(Request):
    """`module.load_state_dict(state_dict)` is about to run.

    Attributes:
        castable: whether the host can cast a (leaf) module's weights at each use.
        cast_at_use: tells the host to do so from now on.
    """

    module: torch.nn.Module
    state_dict: Mapping[str, Any]
    assign: bool
    castable: Callable[[torch.nn.Module], bool]
    cast_at_use: Callable[[torch.nn.Module], None]


@dataclass(frozen=True)
class PlaceModel(Request):
    """A model is about to be made ready on its device.

    Attributes:
        more_bytes: device memory that its weights may take beside what they have there, negative where they should give some
            back; None is no limit.
        patch_all: LoRA go into the weights that stay off the device too, as they go into those on it; else they are added at
            each use, which rounds differently.
        remote: a diffusion model as another process would need it; None for all others.
        elsewhere: another process computes with it, and none of its weights are wanted here.
    """

    repeats = 2
    weights: Weights
    device: torch.device
    more_bytes: float | None
    patch_all: bool = False
    remote: Remote | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class MoveWeights(Request):
    """The classic patcher is about to move weights to the device and patch them.

    Attributes:
        whole: all of them at once, whatever the budget is.
    """

    weights: Weights
    device: torch.device | None
    whole: bool = False


@dataclass(frozen=True)
class OffloadWeights(Request):
    """All weights are about to leave the device. `device` is None where they stay put."""

    weights: Weights
    device: torch.device | None


@dataclass(frozen=True)
class OffloadPart(Request):
    """Some modules, which the host picks, are about to leave the device."""

    weights: Weights
    device: torch.device | None


@dataclass(frozen=True)
class MoveModule(Request):
    """`module.to(device)` is about to run."""

    module: torch.nn.Module
    device: torch.device | None


@dataclass(frozen=True)
class WriteInPlace(Request):
    """The host is about to overwrite a parameter's memory (hooks, in-place patches).

    Attributes:
        beside: keeps the new value beside a parameter that cannot take it (GGUF blocks); None for all others.
    """

    module: torch.nn.Module
    name: str
    beside: Callable[[], None] | None = None


@dataclass(frozen=True)
class PatchWeight(Request):
    """The host is about to replace a GGUF weight by a patched, dense one.

    Attributes:
        at_use: patches the dense weight at each use instead.
    """

    at_use: Callable[[], None]


@dataclass(frozen=True)
class PinWeight(Request):
    """The host is about to page-lock a weight that stays off the device while sampling."""

    weights: Weights
    name: str


@dataclass(frozen=True)
class PinMemory(Request):
    """A tensor's memory is about to be page-locked where it is. The answer is whether it was."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class ReleaseModel(Request):
    """A model is about to give device memory back. `bytes_wanted` is None for all of its `device_bytes`."""

    weights: Weights
    device_bytes: int
    bytes_wanted: float | None


@dataclass(frozen=True)
class FreeMemory(Request):
    """Room is about to be made on a device. The answer is the host's list of unloaded models."""

    device: str
    bytes_wanted: float


@dataclass(frozen=True)
class PlaceModels(Request):
    """Several models are about to be made ready together."""

    weights: tuple[Weights, ...]


@dataclass(frozen=True)
class RunPrompt(Request):
    """A prompt is about to run. `rebuild_models` makes the host drop every output, so that loaders run again."""

    prompt: str
    rebuild_models: Callable[[], None]


@dataclass(frozen=True)
class EmptyMemory(Request):
    """The host is about to forget everything that it keeps between prompts."""
