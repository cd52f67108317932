"""In how many lots heads are exchanged: what was quickest for the slowest rank, tried once for each kind of attention."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from residency.policies.ray_shard.worker import pace as pace_module
from residency.policies.ray_shard.worker.pace import LOTS, Pace

Q = torch.zeros(1, 4, 8, 16)


class Others:
    """A group whose other rank took so long in each number of lots."""

    rank, world = 0, 2

    def __init__(self, *seconds: float) -> None:
        self.seconds = torch.tensor([seconds])
        self.gathered = 0

    def gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        self.gathered += 1
        return torch.cat([tensor, self.seconds], dim)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows."""
    shown = [0.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: shown[0])
    return shown


def attend(pace: Pace, clock: list[float], seconds: dict[int, float], times: int = 7, total: int = 8) -> list[int]:
    """In how many lots each attention was computed."""
    lots = []
    for _ in range(times):
        with pace.timed(total, Q):
            lots.append(pace.lots)
            clock[0] += seconds[pace.lots]
    return lots


@pytest.mark.parametrize(("mine", "theirs", "chosen"), [
    ((1.0, 0.5, 0.8), (0.1, 0.1, 0.1), 2), ((1.0, 0.5, 0.3), (0.1, 0.1, 0.1), 4), ((0.5, 0.6, 0.7), (0.1, 0.1, 0.1), 1),
    ((1.0, 0.5, 0.8), (1.0, 1.2, 0.8), 4), ((1.0, 0.98, 1.0), (0.1, 0.1, 0.1), 1),
], ids=["two", "four", "one", "the other rank is slower", "too little a gain"])
def test_the_quickest_is_kept(clock: list[float], mine: tuple[float, ...], theirs: tuple[float, ...], chosen: int) -> None:
    """After each was tried; the first attention is not counted, as much is done for the first time then."""
    group = Others(*theirs)
    pace = Pace(group)  # type: ignore[arg-type]
    seconds = dict(zip(LOTS, mine, strict=True))
    assert attend(pace, clock, seconds) == [1, 1, 1, 2, 2, 4, 4]
    assert attend(pace, clock, seconds, 3) == [chosen] * 3
    assert group.gathered == 1


def test_other_attentions_are_tried_anew(clock: list[float]) -> None:
    """As those of a longer sequence."""
    pace = Pace(Others(0.1, 0.1, 0.1))  # type: ignore[arg-type]
    attend(pace, clock, {1: 1.0, 2: 0.5, 4: 0.8})
    assert attend(pace, clock, {1: 1.0, 2: 0.5, 4: 0.8}, 1, total=16) == [1]
    assert list(pace.chosen.values()) == [2]


def test_an_attention_that_fails_is_no_measurement(clock: list[float]) -> None:
    """The step is repeated, or it is none of this rank's."""
    pace: Any = Pace(Others(0.1, 0.1, 0.1))  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError), pace.timed(8, Q):
        raise torch.OutOfMemoryError
    assert attend(pace, clock, dict.fromkeys(LOTS, 1.0)) == [1, 1, 1, 2, 2, 4, 4]


def test_it_can_be_told(clock: list[float]) -> None:
    """Nothing is tried then."""
    assert attend(Pace(Others(), always=4), clock, {4: 1.0}, 3) == [4] * 3  # type: ignore[arg-type]
