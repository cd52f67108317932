"""Which blocks go to which device, when they come back, and what is said. torch's `meta` plays the other device: it takes
everything and gives nothing back, so what comes back must be the file's mapping."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from residency.policies import Tools
from residency.policies.hybrid_split import blocks, lending
from residency.policies.hybrid_split.allocation import Allocation
from residency.policies.hybrid_split.blocks import fill, footprint, place_of
from residency.policies.hybrid_split.donors import Donors
from residency.policies.hybrid_split.lending import Lent
from residency.policies.requests import FreeMemory, PlaceModel
from residency.telemetry.sinks import Ring
from support.split_models import SplitWeights, layers
from torch import nn

KB = 2**10
OWN = torch.device("cuda", 0)


@given(st.lists(st.integers(1, 9), max_size=12), st.lists(st.integers(0, 20), max_size=3))
def test_blocks_fill_the_devices_in_whole_runs(sizes: list[int], rooms: list[int]) -> None:
    """No device gets more than its room, one that is passed is short by less than the block that did not fit, and apart from
    blocks too large for a device each holds one run."""
    devices = [(f"cuda:{index}", room) for index, room in enumerate(rooms)]
    places = fill(sizes, devices)

    assert len(places) == len(sizes)
    for device, room in devices:
        mine = [index for index, place in enumerate(places) if place == device]
        held = sum(sizes[index] for index in mine)
        assert held <= room
        if mine and max(sizes) <= min(rooms):
            assert mine == list(range(mine[0], mine[-1] + 1))
            assert mine[-1] + 1 == len(sizes) or sizes[mine[-1] + 1] > room - held


def test_a_block_that_is_larger_than_a_device_passes_it_by() -> None:
    """The ones behind it still go there, and it may go to the next."""
    assert fill([2, 9, 2, 2], [("cuda:1", 5), ("cuda:2", 10)]) == ["cuda:1", "cuda:2", "cuda:1", "cpu"]


def test_ram_may_come_before_a_device() -> None:
    """As the string says."""
    assert fill([2, 2, 2], [("cpu", 2), ("cuda:1", 9)]) == ["cpu", "cuda:1", "cuda:1"]


def test_bytes_are_counted_as_allocators_count_them() -> None:
    """In steps of 512, buffers too; a module in two places is in none."""
    layer = nn.Linear(3, 3)
    layer.register_buffer("more", torch.zeros(600, dtype=torch.uint8))
    assert footprint(layer) == 512 + 512 + 1024
    assert place_of(layer) == "cpu"
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    assert place_of(layer) is None


class Lender:
    """Donors with a second device `meta`, and models whose weights are mapped files."""

    def __init__(self, tools: Tools, save: Callable[..., str]) -> None:
        self.donors, self.tools, self.memory, self._save = Donors(tools), tools, tools.host.memory, save
        self.memory.accelerators = ["cuda:0", "meta:0"]

    def model(self, *sizes: int, name: str = "Flux") -> SplitWeights:
        module = layers(*sizes)
        lease = self.tools.bank.lease(self._save(f"{name}.safetensors", **{
            f"{index}.weight": layer.weight.clone() for index, layer in enumerate(module)}))
        for index, layer in enumerate(module):
            layer.weight = nn.Parameter(lease.tensors[f"{index}.weight"], requires_grad=False)
        return SplitWeights(module, name)

    def settle(self, weights: SplitWeights, devices: str = "cuda:0,0gb;meta:0,5kb;cpu,*") -> dict[str, int]:
        return self.donors.settle(weights, Allocation.parse(devices), OWN)

    def free(self, wanted: int, device: str = "meta:0") -> None:
        self.donors.free(FreeMemory(device, wanted)).act(lambda request=None: [])

    def where(self, weights: SplitWeights) -> str:
        """A letter for each block: away, mapped in RAM, or private in RAM."""
        return "".join("a" if layer.weight.is_meta else "m" if self.tools.bank.file_of(layer.weight) is not None else "p"
                       for layer in weights.module)


@pytest.fixture
def lender(tools: Tools, save: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lender]:
    monkeypatch.setattr(lending, "fingerprints", lambda tensors: [1] * len(tensors))  # `meta` has no bytes to look at
    monkeypatch.setattr(blocks, "parts", lambda tensor: [tensor])
    yield Lender(tools, save)


def test_blocks_go_where_the_string_says_once(lender: Lender, ring: Ring) -> None:
    """What is predicted is what is found there; the next placing finds nothing to do."""
    weights = lender.model(2, 2, 2, 1)
    assert lender.settle(weights) == {"meta:0": 4 * KB}
    assert lender.where(weights) == "aamm"
    assert lender.settle(weights) == {"meta:0": 4 * KB}

    placed = [event.fields for event in ring.named("donors.placed")]
    assert [(event["predicted_bytes"], event["observed_bytes"]) for event in placed] == [
        ({"meta:0": 4 * KB}, {"meta:0": 4 * KB})]


def test_what_the_host_loaded_is_not_touched(lender: Lender) -> None:
    """Only what it casts at each use."""
    weights = lender.model(2, 2, 2)
    weights.loaded = {"0"}
    lender.settle(weights)
    assert lender.where(weights) == "maa"


def test_blocks_leave_before_the_host_makes_room_and_return_when_it_is_not_needed(lender: Lender, ring: Ring) -> None:
    """The last ones first, no more than is needed; to the mapping, without a copy."""
    weights = lender.model(2, 2, 2)
    lender.settle(weights)
    lender.memory.free = 9 * KB
    lender.free(10 * KB)
    assert lender.where(weights) == "amm"
    lender.settle(weights)
    assert lender.where(weights) == "amm"
    lender.donors.prompt_ended()
    lender.settle(weights)

    assert lender.where(weights) == "aam"
    left = [event.fields for event in ring.named("donors.left")]
    assert [(event["device"], event["bytes"]) for event in left] == [("meta:0", 2 * KB)]


def test_what_was_asked_for_and_is_taken_is_not_reserved_twice(lender: Lender) -> None:
    """A model was placed there since: only what it did not take stays free."""
    weights = lender.model(2, 2, 2)
    lender.memory.free = 20 * KB
    lender.free(12 * KB)
    lender.memory.free = 10 * KB
    lender.settle(weights)
    assert lender.where(weights) == "aam"


def test_emptying_a_device_is_no_wish_for_room(lender: Lender) -> None:
    """The host asks for more than there is when it unloads everything."""
    weights = lender.model(2, 2, 2)
    lender.settle(weights)
    lender.free(10**30)
    assert lender.where(weights) == "mmm"
    lender.settle(weights)
    assert lender.where(weights) == "aam"


def test_a_share_in_bytes_is_the_devices_and_a_percentage_is_each_models(lender: Lender) -> None:
    """The model that is placed pushes the other's blocks out, or does not."""
    first, second = lender.model(2, 2, name="first"), lender.model(2, 2, name="second")
    lender.settle(first)
    lender.settle(second)
    assert (lender.where(first), lender.where(second)) == ("mm", "aa")
    for weights in (first, second):
        lender.settle(weights, "meta:0,50%;cpu,*")
    assert (lender.where(first), lender.where(second)) == ("am", "aa")


def test_a_device_without_room_takes_what_it_can_and_it_is_said_once(lender: Lender, ring: Ring) -> None:
    """The rest stays in RAM."""
    weights = lender.model(2, 2, 2)
    lender.memory.free = 3 * KB
    for _ in range(2):
        lender.settle(weights)
        lender.memory.free = KB
    assert lender.where(weights) == "amm"
    assert [(event.fields["device"], event.fields["bytes"]) for event in ring.named("donors.refused")] == [("meta:0", 2 * KB)]


def test_a_device_that_runs_out_of_memory_stops_there(lender: Lender, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that failed is the mapping again, though half of it had moved; no error."""
    weights = lender.model(2, 2)

    def out_of_memory(device: str) -> Any:
        module = weights.module[1]
        if device == "cpu":
            return nn.Module.to(module, device)
        nn.Module.to(module, device)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(weights.module[1], "to", out_of_memory)
    assert lender.settle(weights) == {"meta:0": 2 * KB}
    assert lender.where(weights) == "am"
    refused = ring.named("donors.refused")[0].fields
    assert (refused["reason"], refused["bytes"]) == ("out of memory", 2 * KB)


def test_what_is_lent_is_not_page_locked(lender: Lender) -> None:
    """The host lets go of it first, and blocks go before it would."""
    weights = lender.model(2, 2, 2)
    weights.locked = {"0.weight", "2.weight"}

    def host() -> str:
        lender.donors.before_pinning()
        assert lender.where(weights) == "aam"
        return "placed"

    request = PlaceModel(weights, OWN, None)
    assert lender.donors.around(request, Allocation.parse("meta:0,5kb"), host) == "placed"
    assert weights.locked == {"2.weight"}
    lender.donors.before_pinning()


def test_dynamic_vram_and_devices_that_are_not_here_are_told_of_once(lender: Lender, ring: Ring) -> None:
    """And nothing moves; nor does a model that runs in RAM."""
    weights = lender.model(2, 2)
    for _ in range(2):
        lender.settle(weights, "cuda:7,5kb;cpu,*")
    weights.streamed_by_host = True
    for _ in range(2):
        lender.settle(weights)
    weights.streamed_by_host = False
    lender.donors.settle(weights, Allocation.parse("meta:0,5kb"), torch.device("cpu"))

    assert lender.where(weights) == "mm"
    reasons = [event.fields["reason"] for event in ring.named("policy.declined")]
    assert reasons[0] == "there is no cuda:7 here, there are cuda:0, meta:0"
    assert "dynamic VRAM" in reasons[1]
    assert len(reasons) == 2


def test_closing_takes_everything_back(lender: Lender) -> None:
    """Twice is no harm, and a model that died is no matter."""
    weights, dead = lender.model(2, 2), lender.model(2, name="dead")
    lender.settle(dead, "meta:0,50%")
    lender.settle(weights)
    del dead
    for _ in range(2):
        lender.donors.close()
    assert lender.where(weights) == "mm"


def test_blocks_that_the_host_moved_are_not_lent_any_more(lender: Lender) -> None:
    """One that it loaded on the model's own device stays there when room is made on that device."""
    weights = lender.model(2, 2)
    lender.settle(weights)
    weights.loaded = {"0", "1"}
    lender.donors.settle(weights, Allocation.parse("cuda:0,5kb"), torch.device("meta"))
    lender.memory.free = 0
    lender.free(10 * KB)
    assert lender.where(weights) == "aa"


@pytest.mark.parametrize("changed", [False, True])
def test_only_what_nobody_wrote_to_becomes_the_mapping_again(tools: Tools, save: Callable[..., str], changed: bool) -> None:
    """By its fingerprint: a write on the other device is kept, as a private copy."""
    lender = Lender(tools, save)
    weights = lender.model(2)
    layer, lent = weights.module[0], Lent(tools.bank)
    before = layer.weight.clone()
    place = partial(lent.place, weights.module, [layer], "cpu")  # stays where it is, but is taken note of
    assert place() == (1, "")
    layer.weight = nn.Parameter(before + changed, requires_grad=False)
    lent.take_home([layer])

    assert lender.where(weights) == ("p" if changed else "m")
    assert torch.equal(layer.weight, before + changed)
