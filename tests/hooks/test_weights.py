"""What policies see of a patcher's weights, and of the machine's devices."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from residency.hooks.host import Memory
from residency.hooks.placement import census
from residency.hooks.weights import PatcherWeights
from residency.policies.files.bank import Bank
from residency.policies.memory import Residency

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    """Layers that the host casts, one that it cannot, and one without weights."""

    def __init__(self) -> None:
        super().__init__()
        ops = comfy.ops.disable_weight_init
        self.blocks = torch.nn.ModuleList(ops.Linear(64, 64, bias=False, dtype=torch.float32) for _ in range(3))
        self.fixed = torch.nn.Linear(64, 64)
        self.empty = torch.nn.Sequential()
        self.device = CPU

    def loaded(self, budget: float) -> comfy.model_patcher.ModelPatcher:
        patcher = comfy.model_patcher.ModelPatcher(self, CPU, CPU)
        patcher.partially_load(CPU, budget)
        return patcher


def test_what_the_host_casts_at_use_is_told_in_the_models_order() -> None:
    """By the host's own decision; what it loaded, and what it cannot cast, is not among it."""
    net = Net()
    patcher = net.loaded(0.1)
    weights = PatcherWeights(patcher)
    assert [name for name, _ in weights.cast_at_use()] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [module for _, module in weights.cast_at_use()] == list(net.blocks)

    patcher.partially_load(CPU, 1e9)
    assert weights.cast_at_use() == []


def test_page_locked_weights_are_told_and_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's own names."""
    patcher = Net().loaded(0.1)
    monkeypatch.setattr(comfy.model_management, "unpin_memory", lambda tensor: True)
    patcher.pinned = {"blocks.0.weight", "blocks.1.weight"}
    weights = PatcherWeights(patcher)
    weights.unpin("blocks.0.weight")
    weights.unpin("blocks.2.weight")

    assert weights.pinned() == {"blocks.1.weight"}


def test_bytes_on_another_device_are_not_the_models_own() -> None:
    """Each device by its name."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False).to("meta"))
    assert census(net, Bank(), torch.device("meta")) == {Residency.HOST: 64, Residency.DEVICE: 64}
    assert census(net, Bank(), torch.device("cuda", 0)) == {Residency.HOST: 64, "meta": 64}


def test_devices_and_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has none; a host with two cards names both, and what is not here has no memory."""
    memory = Memory()
    assert memory.devices() == []
    assert memory.total_bytes("cpu") > 2**30
    assert memory.total_bytes("cuda:0") == 0
    assert memory.device_bytes() == {}

    card = SimpleNamespace(device_count=lambda: 2, memory_allocated=lambda index: 7 + index)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: card)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 2**33)
    assert memory.devices() == ["cuda:0", "cuda:1"]
    assert (memory.total_bytes("cuda:1"), memory.total_bytes("cuda:2")) == (2**33, 0)
    assert memory.device_bytes() == {"cuda:0": 7, "cuda:1": 8}


@pytest.mark.parametrize(("most", "pins"), [(-1, False), (0, False), (2**30, True)])
def test_whether_and_how_much_the_host_page_locks(most: int, pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own figures."""
    monkeypatch.setattr(comfy.model_management, "MAX_PINNED_MEMORY", most)
    monkeypatch.setattr(comfy.model_management, "TOTAL_PINNED_MEMORY", 5)
    memory: Any = Memory()

    assert memory.can_pin() is pins
    assert memory.pinned() == (5, most)
