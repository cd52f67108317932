"""How much of a GGUF model may stay dense on its device, and when it goes."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from residency.policies.memory import GB
from residency.policies.requests import FreeMemory, PlaceModel
from residency.policies.zero_copy.dense import DenseWeights

MB = 2**20


class Room:
    """Fills up to its size as soon as it is given one."""

    def __init__(self, held: int = 0, device: str = "cuda:0") -> None:
        self.held, self.device, self.sizes = held, device, []

    def resize(self, size: int) -> None:
        self.sizes.append(size)
        self.held = 0 if self.held > size else self.held


@pytest.fixture
def place(tools: Any, weights_of: Any) -> Any:
    """Places a model of 4 MB, of which 1 MB is on the device, and returns what may stay dense."""
    def ask(room: Room | None, budget: float | None, keep_gb: float | str = "auto", device: str = "cuda:0") -> Any:
        weights = weights_of(torch.nn.Linear(1024, 1024, bias=False), room=room, bytes_on_device=MB)
        decision = DenseWeights(tools, keep_gb).place(PlaceModel(weights, torch.device(device), budget))
        assert decision is None or decision.act(lambda request=None: "placed") == "placed"
        return room.sizes[-1] if room is not None and room.sizes else None
    return ask


def test_half_of_what_the_blocks_leave_of_the_hosts_budget(place: Any) -> None:
    """Three of the four MB are still to come out of it; what is dense already is no reason to keep less."""
    assert place(Room(), 11 * MB) == 4 * MB
    assert place(Room(held=4 * MB), 7 * MB) == 4 * MB


def test_a_model_that_does_not_fit_keeps_nothing(place: Any) -> None:
    assert place(Room(), 2 * MB) == 0


@pytest.mark.parametrize(("budget", "device"), [(None, "cuda:0"), (11.0 * MB, "cpu")], ids=["no budget", "CPU"])
def test_where_the_host_has_no_figure_nothing_is_kept(place: Any, budget: float | None, device: str) -> None:
    """On a CPU the copies would be private RAM, of which users of GGUF files are short."""
    assert place(Room(), budget, device=device) == 0


def test_the_users_figure_wins(place: Any) -> None:
    """Also on a CPU, and none is none."""
    assert place(Room(), None, keep_gb=1.5, device="cpu") == 1.5 * GB
    assert place(Room(), 11 * MB, keep_gb=0) is None


def test_a_model_without_blocks_is_placed_as_ever(place: Any) -> None:
    place(None, 11 * MB)


class TestFreeing:
    """The host wants memory for something else."""

    @pytest.fixture
    def dense(self, tools: Any) -> DenseWeights:
        return DenseWeights(tools, "auto")

    @pytest.fixture
    def room(self, dense: DenseWeights, weights_of: Any) -> Room:
        room = Room()
        weights = weights_of(torch.nn.Linear(4, 4), room=room)
        decision = dense.place(PlaceModel(weights, torch.device("cuda:0"), 11.0 * MB))
        assert decision is not None
        decision.act(lambda request=None: None)
        room.held = 4 * MB
        return room

    @pytest.mark.parametrize(("free", "left"), [(MB, 0), (3 * MB, 4 * MB)], ids=["short", "enough"])
    def test_dense_weights_go_before_a_model_does(self, tools: Any, dense: DenseWeights, room: Room, free: int,
                                                  left: int) -> None:
        """And only where they are in the way."""
        tools.host.memory.free = free
        decision = dense.free(FreeMemory("cuda:0", 2.0 * MB))

        assert decision is not None
        assert decision.act(lambda request=None: room.held) == left

    def test_another_device_is_another_matter(self, dense: DenseWeights, room: Room) -> None:
        assert dense.free(FreeMemory("cuda:1", 2.0 * MB)) is None

    def test_where_nothing_is_dense_the_host_is_not_kept_waiting(self, dense: DenseWeights, room: Room) -> None:
        room.held = 0
        assert dense.free(FreeMemory("cuda:0", 2.0 * MB)) is None

    def test_everything_goes_when_the_user_asks(self, dense: DenseWeights, room: Room) -> None:
        dense.drop()
        assert room.held == 0
