"""What policies may ask of ComfyUI, as small protocols. `hooks/host.py` answers them."""
from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch

from .models import Models, Server


class Reading(Protocol):
    """How the host reads weight files."""

    def maps_files_itself(self) -> bool:
        """Dynamic VRAM is on: the host maps safetensors and streams them from the file."""

    def mmap_disabled(self) -> bool:
        """The user said `--disable-mmap`."""

    def locate(self, tensor: torch.Tensor, file: BinaryIO, offset: int) -> None:
        """Tells the host where in which open file the bytes of a mapped tensor are, to be read straight to the device.

        Nothing where the host cannot do that. The file is kept open as long as the tensor's storage lives.
        """

    def torch_files_mapped(self) -> AbstractContextManager[None]:
        """While inside, the host maps `.ckpt` and `.pt` files, as with `--mmap-torch-files`."""


class Formats(Protocol):
    """Weight formats that the host can be taught."""

    def no_gguf(self) -> str | None:
        """Why this host cannot hold GGUF weights; None where it can."""

    def gguf(self, blocks: torch.Tensor, kind: int, shape: tuple[int, ...], heads: int | None = None) -> torch.Tensor:
        """The weights of this shape that block bytes of a ggml type stand for, as one of the host's quantised tensors.

        Args:
            heads: of attention, where llama.cpp interleaved the rows of each; the weights have them in order.
        """

    def offer_gguf(self, offered: bool) -> None:
        """Whether `.gguf` files are listed where the host's stock nodes choose a model, and read lazily by packs' own nodes.

        Each offer ends with a call of its own that takes it back.
        """


class Memory(Protocol):
    """The host's view of memory."""

    def free_bytes(self, device: str) -> int:
        """What can be allocated on a device now."""

    def total_bytes(self, device: str) -> int:
        """A device's memory, or the machine's for the CPU; 0 for a device that is not here."""

    def devices(self) -> list[str]:
        """The accelerators of the kind that the host computes on, such as `cuda:0`; none on a CPU."""

    def is_oom(self, error: BaseException) -> bool:
        """Whether an error is a device's out-of-memory, as far as the host can tell one; the CPU's never is."""

    def free_others(self, device: str, module: torch.nn.Module) -> None:
        """Takes all models off a device but this one and those in use beside it."""

    def empty_cache(self) -> None:
        """The allocator gives what it holds free back to the device."""

    def can_pin(self) -> bool:
        """The host page-locks weights that stay off the device."""

    def pinned(self) -> tuple[int, int]:
        """(bytes that are page-locked now, the most that the host takes the platform to allow); of all models."""


class Lifecycle(Protocol):
    """Prompts and their end."""

    def raise_if_cancelled(self) -> None:
        """Raises the host's own Cancel where the user asked for it."""

    def is_cancel(self, error: BaseException) -> bool:
        """Whether an error is the host's Cancel."""


class Process(Protocol):
    """The host as a process."""

    def twin(self) -> dict[str, Any]:
        """What another process needs to become a twin of this one.

        root: ComfyUI's folder; arguments: its options, pickled; package and folder: of this plugin; threads: of torch's;
        process: (pid, when it was started, in seconds since the epoch).
        """


@dataclass(frozen=True)
class Host:
    """The capabilities together."""

    reading: Reading
    formats: Formats
    memory: Memory
    lifecycle: Lifecycle
    models: Models
    server: Server
    process: Process
