"""The conditionings of one step, predicted side by side where the host would do so one after the other."""
from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Abandoned(BaseException):
    """Another branch of the step failed. It passes everybody who catches errors, as the host's Cancel does."""


@dataclass(frozen=True)
class Lane:
    """Which workers a branch has.

    Attributes:
        stop: set when its answer is not wanted any more.
    """

    index: int = 0
    count: int = 1
    stop: threading.Event = field(default_factory=threading.Event)

    def of(self, workers: Sequence[T]) -> Sequence[T]:
        """One in `count`, from this one on; all branches have the last ones where there are too few."""
        return workers[self.index % len(workers)::self.count] if workers else workers

    def check(self) -> None:
        """
        Raises:
            Abandoned: the answer is not wanted any more.
        """
        if self.stop.is_set():
            raise Abandoned


_ALL = Lane()
_lane: ContextVar[Lane] = ContextVar("residency_lane", default=_ALL)


def lane() -> Lane:
    """Of the branch that asks; all workers outside of one."""
    return _lane.get()


def side_by_side(branches: Mapping[int, Callable[[], list[torch.Tensor]]]) -> list[torch.Tensor]:
    """The answers of a step's branches, each from its own, asked at the same time. The threads go on in this one's context.

    Raises:
        BaseException: what the first branch to fail raised; the others are abandoned.
    """
    inference, stop = torch.is_inference_mode_enabled(), threading.Event()

    def run(place: int, branch: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        _lane.set(Lane(place, len(branches), stop))
        try:
            with torch.inference_mode(inference), torch.no_grad():
                return branch()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(len(branches), thread_name_prefix="residency-branch") as pool:
        running = [pool.submit(contextvars.copy_context().run, run, place, branch)
                   for place, branch in enumerate(branches.values())]
    answers = dict(zip(branches, _results(running), strict=True))
    merged = list(next(iter(answers.values())))
    for index, answer in answers.items():
        merged[index] = answer[index]
    return merged


def _results(running: Sequence[Future[Any]]) -> list[Any]:
    """Or the error of the branch that failed by itself."""
    errors = [error for one in running if (error := one.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, Abandoned)), errors[0])
    return [one.result() for one in running]
