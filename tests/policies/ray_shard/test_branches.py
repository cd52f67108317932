"""Conditionings side by side: the answers of each by its place, one error for all, and the caller's context in every thread."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar

import pytest
import torch
from residency.policies.ray_shard.branches import Abandoned, Lane, lane, side_by_side

Answer = list[torch.Tensor]
_here: ContextVar[str] = ContextVar("here", default="nowhere")


class Cancel(BaseException):
    """The host's."""


def answer(place: int, value: float, count: int = 3) -> Answer:
    """As the host answers for one conditioning: the others are zero."""
    return [torch.full((2, 2), value if index == place else 0.0) for index in range(count)]


def raising(error: BaseException) -> Callable[[], Answer]:
    def branch() -> Answer:
        raise error
    return branch


def until_abandoned(seen: list[BaseException]) -> Callable[[], Answer]:
    """Waits as `gather` does."""
    def branch() -> Answer:
        for _ in range(500):
            time.sleep(0.01)
            try:
                lane().check()
            except BaseException as error:
                seen.append(error)
                raise
        raise AssertionError("nobody called it off")
    return branch


def test_each_answer_is_its_branchs_own() -> None:
    """Bit for bit, also -0: nothing is added up."""
    merged = side_by_side({0: lambda: answer(0, -0.0), 2: lambda: answer(2, 3.0)})
    assert [one[0, 0].item() for one in merged] == [0, 0, 3]
    assert torch.signbit(merged[0]).all()
    assert not torch.signbit(merged[1]).any()


def test_they_run_at_the_same_time() -> None:
    """Each waits for the other here."""
    both = threading.Barrier(2, timeout=10)

    def branch(place: int) -> Answer:
        both.wait()
        return answer(place, 1.0)

    side_by_side({0: lambda: branch(0), 1: lambda: branch(1)})
    assert not both.broken


def test_each_has_a_lane_and_the_caller_has_all() -> None:
    """By its place among the branches, not by the host's number."""
    lanes: dict[int, tuple[int, int]] = {}

    def branch(place: int) -> Answer:
        lanes[place] = lane().index, lane().count
        return answer(place, 1.0)

    side_by_side({1: lambda: branch(1), 2: lambda: branch(2)})
    assert lanes == {1: (0, 2), 2: (1, 2)}
    assert (lane().index, lane().count) == (0, 1)


@pytest.mark.parametrize(("index", "count", "workers", "expected"), [
    (0, 1, "abc", "abc"), (0, 2, "abcd", "ac"), (1, 2, "abcd", "bd"), (0, 2, "abc", "ac"), (1, 2, "abc", "b"),
    (2, 3, "ab", "a"), (1, 3, "ab", "b"), (1, 2, "a", "a"), (1, 2, "", ""),
])
def test_a_lane_has_workers_of_its_own_where_there_are_enough(index: int, count: int, workers: str, expected: str) -> None:
    """Every one has at least one, if there is any."""
    assert "".join(Lane(index, count).of(workers)) == expected


def test_the_context_reaches_the_threads() -> None:
    """Who is acting is in such a variable; what a branch sets is not the caller's."""
    token = _here.set("caller")
    try:
        seen: list[str] = []

        def branch() -> Answer:
            seen.append(_here.get())
            _here.set("branch")
            return answer(0, 1.0)

        side_by_side({0: branch, 1: branch})
        assert (seen, _here.get()) == (["caller", "caller"], "caller")
    finally:
        _here.reset(token)


@pytest.mark.parametrize("inference", [True, False])
def test_the_threads_are_in_inference_mode_as_the_caller_is(inference: bool) -> None:
    """And never record gradients."""
    seen: list[tuple[bool, bool]] = []

    def branch() -> Answer:
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return answer(0, 1.0)

    with torch.inference_mode(inference):
        side_by_side({0: branch, 1: branch})
    assert seen == [(inference, False)] * 2


@pytest.mark.parametrize("error", [Cancel("by the user"), ValueError("a pack's"), torch.OutOfMemoryError("full")], ids=repr)
@pytest.mark.parametrize("failing", [0, 1])
def test_the_error_of_the_one_that_failed_goes_up(error: BaseException, failing: int) -> None:
    """The same object, whichever branch it was; the others are abandoned, and soon."""
    seen: list[BaseException] = []
    branches = {0: until_abandoned(seen), 1: until_abandoned(seen)}
    branches[failing] = raising(error)
    started = time.perf_counter()
    with pytest.raises(type(error)) as caught:
        side_by_side(branches)
    assert caught.value is error
    assert [type(one) for one in seen] == [Abandoned]
    assert time.perf_counter() - started < 2


def test_abandoning_passes_who_catches_errors() -> None:
    """As Cancel does."""
    assert not issubclass(Abandoned, Exception)


def test_the_next_step_is_not_abandoned() -> None:
    """Each has a stop of its own."""
    with pytest.raises(ValueError):
        side_by_side({0: raising(ValueError()), 1: lambda: answer(1, 1.0)})

    def branch(place: int) -> Answer:
        lane().check()
        return answer(place, 1.0)

    side_by_side({0: lambda: branch(0), 1: lambda: branch(1)})
    lane().check()
