"""A chain with zero_copy in it, and a host that loads, moves and writes as ComfyUI's classic patcher does."""
from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from residency.policies import Tools
from residency.policies.chain import PolicyChain
from residency.policies.requests import BuildModel, FillModule, ReadWeights, Request
from residency.policies.zero_copy import Settings, ZeroCopy
from safetensors.torch import load_file


@dataclass
class FakeWeights:
    """A model with no patches, unless the test says so."""

    module: torch.nn.Module
    name: str = "Model"
    streamed_by_host: bool = False
    kept_by_host: set[str] = field(default_factory=set)
    to_patch: set[str] = field(default_factory=set)
    patching: bool = True
    stays_mapped: bool = False
    room: Any = None
    bytes_on_device: int = 0
    pins: bool = True  # whether the host succeeds with what it page-locks

    def size(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def on_device(self) -> int:
        return self.bytes_on_device

    def dense_room(self) -> Any:
        return self.room

    def drop_dense(self) -> None:
        if self.room is not None:
            self.room.resize(0)

    def restored_by_host(self) -> set[str]:
        return self.kept_by_host

    def patched(self) -> set[str]:
        return self.to_patch

    def pinned(self) -> set[str]:
        return {name for name, _ in self.module.named_parameters()} if self.pins else set()

    def end_patches(self) -> None:
        self.patching = False

    def keep_mapping(self) -> None:
        self.stays_mapped = True


class House:
    """zero_copy alone in its chain, with the tools of one test."""

    def __init__(self, tools: Tools, settings: Settings) -> None:
        self.tools, self.bank, self.policy = tools, tools.bank, ZeroCopy(settings, tools)
        self.chain = PolicyChain([self.policy])
        self.cast_at_use: list[torch.nn.Module] = []

    def ask(self, request: Request, host: Callable[[Request], Any] = lambda request: "host") -> Any:
        return self.chain.answer(request, host)

    def read(self, path: str, with_metadata: bool = False) -> Any:
        return self.ask(ReadWeights(path, with_metadata, on_cpu=True), lambda request: load_file(request.path))

    def fill(self, module: torch.nn.Module, state_dict: Mapping[str, Any], assign: bool = False, strict: bool = False) -> Any:
        """`load_state_dict` outside of any build."""
        def host(request: Request) -> Any:
            assert isinstance(request, FillModule)
            return torch.nn.Module.load_state_dict(request.module, request.state_dict, strict=strict, assign=request.assign)

        return self.ask(FillModule(module, state_dict, assign, lambda leaf: isinstance(leaf, torch.nn.Linear),
                                   self.cast_at_use.append), host)

    def build(self, module: torch.nn.Module, state_dict: Mapping[str, Any], **options: Any) -> Any:
        """`load_state_dict` inside a build, as every loader ends."""
        return self.ask(BuildModel("diffusion model"), lambda request: self.fill(module, state_dict, **options))

    def load(self, module: torch.nn.Module, path: str, **options: Any) -> torch.nn.Module:
        """Reads a file and builds the model from it."""
        self.build(module, self.read(path), **options)
        gc.collect()
        return module

    def mapped(self, tensor: torch.Tensor) -> bool:
        return self.bank.file_of(tensor) is not None


@pytest.fixture
def house(tools: Tools) -> House:
    return House(tools, Settings())


@pytest.fixture
def narrow_house(tools: Tools) -> House:
    """With `keep_file_dtype`."""
    return House(tools, Settings(keep_file_dtype=True))


@pytest.fixture
def weights_of() -> type[FakeWeights]:
    return FakeWeights
