"""Page-locking within one budget, and what becomes of a refusal, on a host that page-locks as ComfyUI does."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from residency.policies import Tools
from residency.policies.chain import PolicyChain
from residency.policies.hybrid_split import HybridSplit, Settings
from residency.policies.memory import Limits, Residency
from residency.policies.requests import PinMemory, PinWeight
from residency.policies.zero_copy import Settings as MappedSettings
from residency.policies.zero_copy import ZeroCopy
from residency.telemetry.sinks import Ring
from support.split_models import SplitWeights, layers
from torch import nn

KB = 2**10


class Host:
    """Page-locks weights one after the other; the driver takes `room` bytes and then refuses, or raises."""

    def __init__(self, tools: Tools, with_zero_copy: bool = False) -> None:
        policies = [HybridSplit(Settings(), tools), *([ZeroCopy(MappedSettings(), tools)] if with_zero_copy else [])]
        self.chain, self.memory, self.tools = PolicyChain(policies), tools.host.memory, tools
        self.room, self.tries, self.error = 2**40, 0, ""

    def pin(self, weights: SplitWeights, *names: str) -> None:
        """As the classic patcher does with the weights that it left in RAM."""
        for name in names or tuple(name for name, _ in weights.module.named_parameters()):
            def lock(request: Any, name: str = name) -> None:
                if self.lock(weights.module.get_parameter(name)):
                    weights.locked.add(name)

            self.chain.answer(PinWeight(weights, name), lock)

    def lock(self, tensor: torch.Tensor) -> Any:
        def register(request: Any) -> bool:
            self.tries += 1
            if request.tensor.nbytes > self.room and self.error:
                raise RuntimeError(self.error)
            if request.tensor.nbytes > self.room:
                return False
            self.room -= request.tensor.nbytes
            self.memory.pinned_now += request.tensor.nbytes
            return True

        return self.chain.answer(PinMemory(tensor), register)


@pytest.fixture
def host(tools: Tools) -> Host:
    return Host(tools)


def limits(tools: Tools, pinned: int | None) -> None:
    tools.ledger.limits = Limits(ram=2**30, pinned=pinned, pad=0)


def test_the_sum_over_all_models_stays_within_the_budget(host: Host, tools: Tools) -> None:
    """The host asks for the largest first, so the smallest are left; one that still fits is taken."""
    limits(tools, 7 * KB)
    first, second = SplitWeights(layers(3, 2)), SplitWeights(layers(4, 1))
    for weights in (first, second):
        host.pin(weights)

    assert (first.locked, second.locked) == ({"0.weight", "1.weight"}, {"1.weight"})
    assert host.memory.pinned_now == 6 * KB
    assert host.lock(torch.zeros(2 * KB, dtype=torch.uint8)) is False
    assert host.lock(torch.zeros(KB, dtype=torch.uint8)) is True


@pytest.mark.parametrize("pinned", [None, 100 * KB])
def test_the_platforms_limit_holds_beside_it(host: Host, tools: Tools, pinned: int | None) -> None:
    """What the host says may be page-locked is never passed, with a larger budget or none."""
    limits(tools, pinned)
    host.memory.pinned_most = 4 * KB
    weights = SplitWeights(layers(3, 2, 1))
    host.pin(weights)

    assert weights.locked == {"0.weight", "2.weight"}


def test_a_budget_of_nothing_page_locks_nothing(host: Host, tools: Tools, ring: Ring) -> None:
    """Which is no failure."""
    limits(tools, 0)
    host.pin(SplitWeights(layers(1)))
    host.chain.prompt_ended()

    assert host.tries == 0
    assert ring.named("pin.failed") == []


@pytest.mark.parametrize("error", ["", "CUDA error: out of memory"], ids=["refused", "raised"])
def test_a_refusal_of_the_driver_is_one_event_and_no_error(host: Host, ring: Ring, error: str) -> None:
    """It is asked once, and then no more for this model until the prompt ends; other models are not affected."""
    host.room, host.error = 5 * KB, error
    weights, other = SplitWeights(layers(3, 4, 1), "Flux"), SplitWeights(layers(1), "VAE")
    host.pin(weights)
    assert (host.tries, weights.locked) == (2, {"0.weight"})
    host.pin(other)
    assert other.locked == {"0.weight"}
    assert ring.named("pin.failed") == []

    host.chain.prompt_ended()
    failed = [event.fields for event in ring.named("pin.failed")]
    assert [(event["model"], event["bytes"]) for event in failed] == [("Flux", 5 * KB)]
    assert (error or "refused") in failed[0]["reason"]

    host.pin(weights, "2.weight")
    host.chain.prompt_ended()
    assert weights.locked == {"0.weight", "2.weight"}
    assert len(ring.named("pin.failed")) == 1


def test_what_the_host_would_not_page_lock_anyway_is_no_failure(host: Host, ring: Ring) -> None:
    """A view with gaps, an absent weight, one on another device, and a host that does not page-lock."""
    host.room = 0
    gaps = nn.Linear(4, 4, bias=False)
    gaps.weight = nn.Parameter(torch.zeros(8, 4)[::2], requires_grad=False)
    host.pin(SplitWeights(nn.Sequential(gaps)))
    elsewhere = SplitWeights(layers(1).to("meta"))
    host.pin(elsewhere)
    host.memory.pins = False
    host.pin(SplitWeights(layers(1)))
    host.chain.prompt_ended()

    assert ring.named("pin.failed") == []


def test_mapped_weights_share_the_budget_and_are_copied_only_to_be_page_locked(
        tools: Tools, save: Callable[..., str], ring: Ring) -> None:
    """A weight beyond the budget stays the file's mapping, and so does one that the driver refuses."""
    host = Host(tools, with_zero_copy=True)
    limits(tools, 5 * KB)
    module = layers(3, 4, 2)
    lease = tools.bank.lease(save(**{f"{index}.weight": layer.weight.clone() for index, layer in enumerate(module)}))
    for index, layer in enumerate(module):
        layer.weight = nn.Parameter(lease.tensors[f"{index}.weight"], requires_grad=False)
    private, weights = SplitWeights(layers(1), "VAE"), SplitWeights(module, "Flux")
    host.pin(private)
    host.room = 3 * KB
    host.pin(weights)
    mapped = [tools.bank.file_of(layer.weight) is not None for layer in module]
    assert (weights.locked, mapped, host.memory.pinned_now) == ({"0.weight"}, [False, True, True], 4 * KB)

    limits(tools, 100 * KB)
    host.pin(weights, "2.weight")
    host.chain.prompt_ended()
    assert tools.bank.file_of(module[2].weight) is not None
    assert [event.fields["bytes"] for event in ring.named("pin.failed")] == [2 * KB]
    assert tools.ledger.room("another", Residency.PINNED) == 97 * KB

