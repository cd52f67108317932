"""What policies may ask of ComfyUI: the capabilities that `policies/host.py` describes, and a few for the composition."""
from __future__ import annotations

import inspect
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import comfy.cli_args
import comfy.memory_management
import comfy.model_management
import comfy.utils
import folder_paths
import psutil
import torch

from ..policies.host import Host
from ..telemetry import emit
from .gguf_weights.reader import LazyReader
from .models import Models
from .startup import Server

_GGUF_FOLDERS = ("diffusion_models", "text_encoders")


class Reading:
    """Implements `policies.host.Reading`."""

    _lock = threading.Lock()

    def maps_files_itself(self) -> bool:
        return bool(getattr(comfy.memory_management, "aimdo_enabled", False))

    def mmap_disabled(self) -> bool:
        return bool(getattr(comfy.utils, "DISABLE_MMAP", False))

    def locate(self, tensor: torch.Tensor, file: BinaryIO, offset: int) -> None:
        slices = getattr(comfy.memory_management, "TensorFileSlice", None)
        if slices is None or not self.maps_files_itself():
            return
        # A lock guards the file's position, in newer hosts; in older ones only the thread that opened the file may read it.
        known = {"file_ref": file, "lock": self._lock, "thread_id": threading.get_ident(), "offset": offset,
                 "size": tensor.nbytes}
        if set(slices._fields) <= set(known):
            storage: Any = tensor.untyped_storage()
            storage._comfy_tensor_file_slice = slices(**{name: known[name] for name in slices._fields})

    @contextmanager
    def torch_files_mapped(self) -> Iterator[None]:
        """The host's own switch, turned on for one load."""
        before = comfy.utils.MMAP_TORCH_FILES
        comfy.utils.MMAP_TORCH_FILES = not self.mmap_disabled()
        try:
            yield
        finally:
            comfy.utils.MMAP_TORCH_FILES = before


class Formats:
    """Implements `policies.host.Formats`."""

    def __init__(self) -> None:
        self._reader = LazyReader()
        self._offers = 0  # when settings change the new policy starts before the old one is closed

    def no_gguf(self) -> str | None:
        try:
            from .gguf_weights import layout, ops  # noqa: F401  the host's own package for quantised tensors may be missing
        except ImportError as error:
            return f"this ComfyUI has no quantised tensors ({error})"
        return None

    def gguf(self, blocks: torch.Tensor, kind: int, shape: tuple[int, ...], heads: int | None = None) -> torch.Tensor:
        from .gguf_weights.layout import wrap

        return wrap(blocks, kind, shape, heads)

    def offer_gguf(self, offered: bool) -> None:
        self._offers = max(0, self._offers + (1 if offered else -1))
        offered = self._offers > 0
        self._reader.turn(offered)
        folders = folder_paths.folder_names_and_paths
        for kind in _GGUF_FOLDERS:
            if kind in folders:
                paths, extensions = folders[kind]
                # Most folders share one set of extensions, so it is replaced and not changed.
                folders[kind] = (paths, (set(extensions) | {".gguf"}) if offered else (set(extensions) - {".gguf"}))
                folder_paths.filename_list_cache.pop(kind, None)


class Memory:
    """Implements `policies.host.Memory`, and tells telemetry what the devices hold."""

    def free_bytes(self, device: str) -> int:
        return int(comfy.model_management.get_free_memory(torch.device(device)))

    def total_bytes(self, device: str) -> int:
        here = device == "cpu" or device in self.devices()
        return int(comfy.model_management.get_total_memory(torch.device(device))) if here else 0

    def devices(self) -> list[str]:
        device = comfy.model_management.get_torch_device()
        if device.type in ("cpu", "privateuseone"):  # the second is DirectML, whose devices have no module
            return []
        module: Any = torch.get_device_module(device)
        count = module.device_count() if hasattr(module, "device_count") else 1
        return [f"{device.type}:{index}" for index in range(count)]

    def is_oom(self, error: BaseException) -> bool:
        kind = comfy.model_management.OOM_EXCEPTION
        if kind is Exception:  # a torch without one of its own: every error would be it
            return False
        known = getattr(comfy.model_management, "is_oom", None)
        return bool(known(error)) if known is not None else isinstance(error, kind)

    def free_others(self, device: str, module: torch.nn.Module) -> None:
        loaded = comfy.model_management.current_loaded_models
        needed = [one for one in loaded if one.currently_used or (one.model is not None and one.model.model is module)]
        comfy.model_management.free_memory(1e30, torch.device(device), keep_loaded=needed)

    def empty_cache(self) -> None:
        comfy.model_management.soft_empty_cache()

    def can_pin(self) -> bool:
        return self.pinned()[1] > 0

    def pinned(self) -> tuple[int, int]:
        management = comfy.model_management
        return int(getattr(management, "TOTAL_PINNED_MEMORY", 0)), int(getattr(management, "MAX_PINNED_MEMORY", 0))

    def device_bytes(self) -> dict[str, int]:
        """Bytes that this process has allocated, by device; nothing for the CPU."""
        return {device: int(torch.get_device_module(device).memory_allocated(int(device.rpartition(":")[2])))
                for device in self.devices() if hasattr(torch.get_device_module(device), "memory_allocated")}


class Lifecycle:
    """Implements `policies.host.Lifecycle`."""

    def raise_if_cancelled(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def is_cancel(self, error: BaseException) -> bool:
        return isinstance(error, comfy.model_management.InterruptProcessingException)


class Process:
    """Implements `policies.host.Process`."""

    def twin(self) -> dict[str, Any]:
        here = psutil.Process()
        return {"root": str(Path(inspect.getfile(comfy.model_management)).parents[1]),
                "arguments": pickle.dumps(vars(comfy.cli_args.args)),
                "package": __name__.rpartition(".hooks.")[0], "folder": str(Path(__file__).parents[1]),
                "threads": torch.get_num_threads(), "process": (here.pid, here.create_time())}


def connect() -> Host:
    """The host that we are running in."""
    return Host(Reading(), Formats(), Memory(), Lifecycle(), Models(), Server(), Process())


def user_folder() -> Path:
    """Where the user's settings and the telemetry file live."""
    return Path(folder_paths.get_user_directory()) / "residency"


def tell_started(version: str, policies: list[str], settings: str, folder: Path) -> None:
    """The first line that a user looks for."""
    try:
        from comfyui_version import __version__ as host
    except ImportError:
        host = "unknown"
    emit("plugin.started", version=version, host=host, policies=policies, settings=settings, folder=str(folder))
