"""Files and a host for the policies: real files of a few KB, and a host that does as ComfyUI does."""
from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from residency.policies import Tools
from residency.policies.files.bank import Bank
from residency.policies.host import Host
from residency.policies.memory import Ledger, Limits
from residency.policies.models import KINDS, Recipe
from safetensors.torch import save_file

Save = Callable[..., str]


class FakeReading:
    """How the host reads; `mapped` counts the times it was told to map torch's files, `located` is where tensors are."""

    def __init__(self) -> None:
        self.maps, self.no_mmap, self.mapped = False, False, 0
        self.located: list[tuple[torch.Tensor, bytes]] = []

    def maps_files_itself(self) -> bool:
        return self.maps

    def mmap_disabled(self) -> bool:
        return self.no_mmap

    def locate(self, tensor: torch.Tensor, file: BinaryIO, offset: int) -> None:
        self.located.append((tensor, os.pread(file.fileno(), tensor.nbytes, offset)))

    @contextlib.contextmanager
    def torch_files_mapped(self) -> Iterator[None]:
        self.mapped += 1
        yield


class FakeFormats:
    """A host that holds GGUF weights, or that says in `missing` why it cannot; `offered` is what it was told last."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self.offered: bool | None = None

    def no_gguf(self) -> str | None:
        return self.missing

    def gguf(self, blocks: torch.Tensor, kind: int, shape: tuple[int, ...], heads: int | None = None) -> torch.Tensor:
        from residency.hooks.gguf_weights.layout import wrap

        return wrap(blocks, kind, shape, heads)

    def offer_gguf(self, offered: bool) -> None:
        self.offered = offered


class FakeMemory:
    """Whether the host pins, what it has pinned and may pin at most, and what is free on every device; `others` is for whom the
    others had to leave."""

    def __init__(self) -> None:
        self.pins, self.free, self.total = True, 2**30, 2**31
        self.accelerators = ["cuda:0"]
        self.pinned_now, self.pinned_most = 0, 2**40
        self.others: list[tuple[str, torch.nn.Module]] = []

    def free_bytes(self, device: str) -> int:
        return self.free

    def total_bytes(self, device: str) -> int:
        return self.total if device in ("cpu", *self.accelerators) else 0

    def devices(self) -> list[str]:
        return self.accelerators

    def is_oom(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def free_others(self, device: str, module: torch.nn.Module) -> None:
        self.others.append((device, module))

    def empty_cache(self) -> None: ...

    def can_pin(self) -> bool:
        return self.pins

    def pinned(self) -> tuple[int, int]:
        return self.pinned_now, self.pinned_most if self.pins else 0


class FakeLifecycle:
    """The user's Cancel, if `cancel` is set."""

    def __init__(self) -> None:
        self.cancel: BaseException | None = None

    def raise_if_cancelled(self) -> None:
        if self.cancel is not None:
            raise self.cancel

    def is_cancel(self, error: BaseException) -> bool:
        return error is self.cancel


class FakeModels:
    """Loaders that list `files`, whose answers are what `load` is given in `loads`; `loaded` remembers the recipes."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        self.loads: Callable[[Recipe], Any] = lambda recipe: None
        self.loaded: list[Recipe] = []
        self.now = {"diffusion model": "cpu and cpu"}
        self.woken = 0

    def choices(self, kind: str) -> list[str]:
        return list(self.files[kind])

    def options(self, name: str) -> list[str]:
        return {"type": ["stable_diffusion", "sdxl", "flux"], "device": ["default", "cpu"],
                "weight_dtype": ["default", "fp8_e4m3fn"]}[name]

    def paths(self, recipe: Recipe) -> tuple[str, ...]:
        return tuple(self.files[recipe.kind][name] for name in recipe.names)

    def load(self, recipe: Recipe) -> Any:
        self.loaded.append(recipe)
        return self.loads(recipe)

    def devices(self) -> dict[str, str]:
        return dict(self.now)

    def wake(self) -> dict[str, str]:
        self.woken += 1
        return {}


class FakeServer:
    """A start that waits until the test calls `started`, and routes that the test asks."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.works: list[tuple[bool, Callable[[], None]]] = []
        self.routes: dict[str, Callable[[], Any]] = {}

    def at_start(self, wait: bool, work: Callable[[], None]) -> None:
        self.works.append((wait, work))

    def started(self) -> None:
        for _, work in self.works:
            work()

    def publish(self, path: str, answer: Callable[[], Any]) -> None:
        self.routes[path] = answer

    def folder(self) -> str:
        return str(self.root)


class FakeProcess:
    """A host whose twin nobody can be."""

    def twin(self) -> dict[str, Any]:
        return {"root": "", "arguments": b"", "package": "residency", "folder": "", "threads": 1, "process": (0, 0.0)}


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Tools]:
    """A bank and a ledger of the test's own."""
    host = Host(FakeReading(), FakeFormats(), FakeMemory(), FakeLifecycle(), FakeModels(), FakeServer(tmp_path), FakeProcess())
    made = Tools(Bank(), Ledger(Limits(ram=2**30, pinned=2**30, pad=0)), host)
    yield made
    made.bank.empty()
    gc.collect()


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes tensors to a safetensors file and returns its path; without tensors, one `weight` of 4 KB."""
    def write(name: str = "model.safetensors", metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> str:
        path = str(tmp_path / name)
        save_file(tensors or {"weight": torch.arange(1024, dtype=torch.float32)}, path, metadata=metadata)
        return path
    return write
