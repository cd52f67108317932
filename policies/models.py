"""Models as their loaders give them: what a user chose, and what the host made of it."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .memory import Residency

# What a VAE, which is not the module that holds its weights, is called in another process; no layer has such a name.
ITSELF = "."
KINDS = ("checkpoints", "text_encoders", "diffusion_models", "vaes")


@dataclass(frozen=True)
class Recipe:
    """What a user chooses on a stock loader node, in the words of its lists.

    Attributes:
        kind: one of `KINDS`.
        names: the files; one, or up to four text encoders.
        type: of text encoders, as *Load CLIP* calls it.
    """

    kind: str
    names: tuple[str, ...]
    type: str = "stable_diffusion"
    device: str = "default"
    weight_dtype: str = "default"


@dataclass(frozen=True)
class Part:
    """A model in a loader's answer.

    Attributes:
        component: "diffusion_model", "text_encoder", "vae", or "" for another kind.
        size: bytes of its weights.
        run_on: sets the device that it runs on from now on, as torch calls it.
    """

    component: str
    module: torch.nn.Module
    size: int
    run_on: Callable[[str], None]


class Kept(Protocol):
    """One load's answer, kept: the host's own objects, and what may be asked of them."""

    def lend(self) -> Any:
        """The same answer for another user, made of the host's own clones."""

    def in_use(self) -> bool:
        """Whether something that was lent lives."""

    def modules(self) -> Sequence[torch.nn.Module]:
        """The torch modules that hold the weights."""

    def residency(self) -> Mapping[Residency, int]:
        """Where the bytes of the weights are."""

    def altered(self) -> str | None:
        """Why these are not the weights and layers any more that were loaded; None while they are."""

    def drop(self) -> None:
        """Forgets the host's objects; what was lent lives on."""

    def place(self) -> None:
        """Puts the weights on the device now."""

    def follow_devices(self) -> None:
        """Takes the host's present choice of devices, where it had the host's choice when it was loaded."""


class Remote(Protocol):
    """What another process needs in order to compute a model as this one would.

    Attributes:
        kind: what it is: "diffusion_model" or "vae".
    """

    kind: str

    @property
    def module(self) -> torch.nn.Module:
        """The torch module that holds the weights, shared by all clones."""

    def as_built(self) -> Any:
        """The model without patches, to be pickled. Asked while nothing of it is on a device and nothing is patched."""

    def unpaged(self) -> AbstractContextManager[None]:
        """While inside, layers are without what the host notes of its own paging: it is of use in this process alone."""

    def token(self) -> object:
        """Changes with every change of what is patched: LoRA, merges, replaced objects, scheduled hooks."""

    def patches(self) -> Mapping[str, Any]:
        """What is patched now, to be pickled. Of a VAE also its `attributes`, which anybody may have changed."""

    def known(self) -> Mapping[int, str]:
        """`id` of objects that the other process has already, and what they are called there."""

    def place(self) -> None:
        """Makes the model ready here, as the host would have done without us."""


class Models(Protocol):
    """The host's stock loaders."""

    def choices(self, kind: str) -> Sequence[str]:
        """The file names that the loader of this kind lists."""

    def options(self, name: str) -> Sequence[str]:
        """What a loader's option (`type`, `device`, `weight_dtype`) may be."""

    def paths(self, recipe: Recipe) -> tuple[str, ...]:
        """The files of a recipe.

        Raises:
            FileNotFoundError: there is no such file.
        """

    def load(self, recipe: Recipe) -> Any:
        """Loads as the stock node does, so that policies are asked. The answer is the host's own object.

        Raises:
            Exception: what the host raises.
        """

    def devices(self) -> Mapping[str, str]:
        """The devices that the host chose for each kind of model."""

    def wake(self) -> Mapping[str, str]:
        """Lets the host choose its devices again, if an accelerator has come since the start; gives what changed."""


class Server(Protocol):
    """The host's web server."""

    def at_start(self, wait: bool, work: Any) -> None:
        """Runs `work` in a thread once every pack is loaded: before the port opens if `wait`, else in the background."""

    def publish(self, path: str, answer: Any) -> None:
        """Answers `GET path` with the JSON that `answer` gives; None there is *not found*."""

    def folder(self) -> str:
        """Where the user's settings and our files are."""
