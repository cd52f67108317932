"""When a device runs out of memory: room is made, and what failed is repeated, with the result that it would have had.

A step is repeated twice: first everything else leaves the device and the model gives back half of its weights, then all; what
it gave back streams. A model that did not fit when it was loaded is loaded with half of its budget, then with nothing. If that
did not help, or the failure lay outside a step, the whole call is repeated once, with the same random numbers. An error that
remains is the host's own, with a sentence about what was tried.
"""
from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...telemetry import emit
from ..computing import Compute, ComputeAll, ComputeImage, ComputeStep, ComputeTiles, IgnoreError
from ..policy import Decision, OutOfMemory, Proceed
from ..requests import PlaceModel
from ..sampling import SampleStep
from .headroom import Headroom

if TYPE_CHECKING:
    from .. import Tools

MB = 2**20
_ALL = 1e30
_MARK = "_residency_given_up"


@dataclass(frozen=True)
class _Situation:
    """
    Attributes:
        enclosed: something is under way that looks after an out-of-memory.
        repeating: it failed before.
        untiled: it is a VAE's, in one piece, and would be repeated before there are tiles.
    """

    enclosed: bool = False
    repeating: bool = False
    untiled: bool = False


_QUIET = _Situation()
_situation: ContextVar[_Situation] = ContextVar("residency_rescue", default=_QUIET)


@dataclass
class _GivenUp:
    """Kept with an error: what the host said, and what was tried in vain."""

    text: str
    whole: bool = False
    attempts: int = 0
    freed: int = 0


@dataclass
class _Trial:
    """One request, and what was done for it."""

    request: Compute | PlaceModel
    what: str
    attempts: int = 0
    freed: int = 0
    freed_last: int = 1

    def may_go_on(self) -> bool:
        """Where nothing was freed a second repeat would be the first again; a model is loaded with less."""
        return self.attempts < self.request.repeats and (self.freed_last > 0 or isinstance(self.request, PlaceModel))


def let_go(error: BaseException) -> None:
    """Forgets what the frames of an error hold, which is the failed computation's tensors."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            pending += [one.__context__, one.__cause__]
            traceback.clear_frames(one.__traceback__)
            one.__traceback__ = None


class Rescue:
    """Decides on what is computed, on what the host would do instead, and on placings."""

    def __init__(self, tools: Tools) -> None:
        self._memory, self._lifecycle = tools.host.memory, tools.host.lifecycle
        self.headroom = Headroom()
        self.rules: dict[type[Any], Any] = {SampleStep: self.step, ComputeStep: self.compute, ComputeImage: self.compute,
                                            ComputeAll: self.compute, ComputeTiles: self.tiles, IgnoreError: self.ignored}

    def compute(self, request: Compute) -> Decision:
        return Decision("", partial(self._compute, request))

    def step(self, request: SampleStep) -> Decision | None:
        return self.compute(request) if request.alone and request.device.type != "cpu" else None

    def tiles(self, request: ComputeTiles) -> Decision | None:
        return Decision("", _refuse) if _situation.get().untiled else None

    def ignored(self, request: IgnoreError) -> Decision | None:
        """Without what failed it would be another image."""
        return Decision("", partial(_raise, request.error)) if _situation.get().enclosed else None

    def place(self, request: PlaceModel) -> Decision | None:
        return None if request.device.type == "cpu" else Decision("", partial(self.load, self.headroom.within(request)))

    def _compute(self, request: Compute, proceed: Proceed) -> Any:
        trial = _Trial(request, request.what)

        def make_room() -> None:
            self._make_room(request, _ALL if trial.attempts > 1 else request.weights.on_device() / 2)
            request.rewind()

        return self._repeatedly(trial, proceed, make_room)

    def load(self, asked: PlaceModel, proceed: Proceed) -> Any:
        """Lets the host place a model, with less where that was too much. What the model gave back before is off already."""
        request, weights = asked, asked.weights
        patch_all = asked.more_bytes is not None and bool(weights.patched()) and not weights.streamed_by_host
        if patch_all and _situation.get().repeating:  # what is repeated gets the numbers that it had
            asked = replace(asked, patch_all=True)
        budget = min(weights.size(), (asked.more_bytes or 0) + weights.on_device())
        trial = _Trial(asked, "loading")

        def make_room() -> None:
            nonlocal asked
            self._make_room(request, 0)
            if asked.more_bytes is not None:  # the host has taken it off the device
                share = int(budget) // 2 if trial.attempts == 1 else 0
                asked = replace(asked, more_bytes=share, patch_all=patch_all)
                self.headroom.add(weights, max(0, int(budget) - share - self.headroom.reserve_of(weights.module)))

        answer = self._repeatedly(trial, lambda: proceed(asked), make_room)
        if asked.patch_all:
            weights.place_anew()
        return answer

    def _repeatedly(self, trial: _Trial, proceed: Callable[[], Any], make_room: Callable[[], None]) -> Any:
        outer = _situation.get()
        while True:
            token = _situation.set(_Situation(True, outer.repeating or trial.attempts > 0,
                                              isinstance(trial.request, ComputeImage) and trial.may_go_on()))
            try:
                return proceed()
            except RuntimeError as error:
                if not self._may_repeat(trial, error):
                    self._give_up(trial, error, last=not outer.enclosed)
                    raise
                failed = error
            finally:
                _situation.reset(token)
            self._prepare(trial, failed, make_room, last=not outer.enclosed)
            del failed

    def _is_oom(self, error: BaseException) -> bool:
        return isinstance(error, OutOfMemory) or self._memory.is_oom(error)

    def _may_repeat(self, trial: _Trial, error: RuntimeError) -> bool:
        given_up: _GivenUp | None = getattr(error, _MARK, None)
        in_vain = given_up is not None and (given_up.whole or not isinstance(trial.request, ComputeAll))
        return trial.may_go_on() and not in_vain and self._is_oom(error)

    def _prepare(self, trial: _Trial, error: RuntimeError, make_room: Callable[[], None], last: bool) -> None:
        """Makes room for another attempt. `error` goes up where that fails."""
        let_go(error)
        started, device = time.perf_counter(), str(trial.request.device)
        trial.attempts += 1
        before = self._memory.free_bytes(device)
        try:
            gc.collect()
            make_room()
        except (RuntimeError, TypeError, AttributeError):  # a pack's patcher may be of another shape than the host's
            self._give_up(trial, error, last)
            raise error from None
        trial.freed_last = max(0, self._memory.free_bytes(device) - before)
        trial.freed += trial.freed_last
        self._lifecycle.raise_if_cancelled()
        emit("rescue.repeated", what=trial.what, model=trial.request.weights.name, attempt=trial.attempts,
             freed_bytes=trial.freed_last, seconds=time.perf_counter() - started, error=_short(error))

    def _make_room(self, request: Compute | PlaceModel, size: float) -> None:
        weights = request.weights
        self._memory.free_others(str(request.device), weights.module)
        if size and weights.on_device():
            self.headroom.add(weights, weights.give_back(size))
        self._memory.empty_cache()

    def _give_up(self, trial: _Trial, error: RuntimeError, last: bool) -> None:
        """Adds our figures to the host's error, if it is an out-of-memory.

        Args:
            last: nobody repeats anything after us.
        """
        if not self._is_oom(error):
            return
        given_up: _GivenUp = getattr(error, _MARK, None) or _GivenUp(str(error.args[0]) if error.args else "")
        given_up.whole |= isinstance(trial.request, ComputeAll)
        given_up.attempts += trial.attempts
        given_up.freed += trial.freed
        setattr(error, _MARK, given_up)
        error.args = (f"{given_up.text}\n{self._sentence(trial.request, given_up)}", *error.args[1:])
        if last:
            emit("rescue.failed", what=trial.what, model=trial.request.weights.name, attempts=given_up.attempts,
                 freed_bytes=given_up.freed, error=_short(error))

    def _sentence(self, request: Compute | PlaceModel, given_up: _GivenUp) -> str:
        device, weights = str(request.device), request.weights
        figures = (given_up.freed, self._memory.free_bytes(device), self._memory.total_bytes(device), weights.on_device(),
                   weights.size())
        freed, free, total, held, size = (f"{number / MB:.0f} MB" for number in figures)
        return (f"Residency freed {freed} and repeated it {given_up.attempts} times, in vain. "
                f"{device} has {free} of {total} free, {weights.name} has {held} of its {size} there.")


def _raise(error: BaseException, proceed: Proceed) -> Any:
    raise OutOfMemory(str(error)) from error


def _refuse(proceed: Proceed) -> Any:
    raise OutOfMemory("a VAE ran out of memory before it went on in tiles")


def _short(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
