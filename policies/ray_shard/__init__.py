"""Several devices, one copy of the weights, any workflow.

Samplers, guidance, ControlNets, previews and everything else go on in ComfyUI's process; only the model's own predictions are
computed by workers, which are processes that Ray starts. Each holds the real ComfyUI model over the same mapping of the same
file.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from ..computing import ScaleTiles
from ..models import Remote
from ..policy import Decision, Policy, Proceed, Unfit
from ..requests import BuildModel, PlaceModel, ReleaseModel, Request
from ..sampling import BatchRoom, Predict, SampleStep
from .settings import WHOLE, Settings, WorkerSettings

if TYPE_CHECKING:
    from .. import Tools

__all__ = ["Settings", "create"]

NAME = "ray_shard"
# Read when Ray is imported: without it Ray listens on all of the machine's addresses, although nobody else is to reach it.
_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
_INSTALL = "it needs Ray: run `pip install \"ray>=2.40\"` in the environment of your ComfyUI"


def create(settings: Settings, tools: Tools) -> Policy:
    return RayShard(settings, tools)


class RayShard(Policy):
    """Has models predict in workers."""

    name = NAME

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self.settings: Settings = settings
        self._tools = tools
        self._rules: dict[type[Request], Any] = {
            BuildModel: self._build, PlaceModel: self._place, SampleStep: self._step, Predict: self._predict,
            BatchRoom: self._room, ReleaseModel: self._release,
        }
        if settings.tiles:
            self._rules[ScaleTiles] = self._scale
        self.answers = frozenset(self._rules)
        self._started = False
        self._left: WeakSet[torch.nn.Module] = WeakSet()  # to the host: they cannot be packed

    def start(self) -> None:
        if self.settings.is_local:
            os.environ.setdefault(*_LOOPBACK)
        try:
            from .crew import Crew
            from .dispatch import Dispatcher
            from .freight import Freighter
            from .tiles import Tiler
        except ImportError as error:
            raise Unfit(f"{_INSTALL} ({error})") from None
        devices = self._devices()
        self._count = len(devices)
        host = self._tools.host
        self._crew = Crew(self.settings, devices, host.process.twin, host.lifecycle.raise_if_cancelled)
        self._freighter = Freighter(self._crew, self._tools.bank)
        self._dispatcher = Dispatcher(self.settings, self._crew, self._freighter)
        self._tiler = Tiler(self.settings, self._crew, self._freighter, self._dispatcher.score)
        self._started = True

    def _devices(self) -> Sequence[WorkerSettings]:
        """A device for each worker."""
        there = self._tools.host.memory.devices()
        wanted = self.settings.workers or (WorkerSettings(),) * len(there)
        if not self.settings.workers and len(there) < 2:
            raise Unfit(f"workers = \"auto\" is one for each accelerator, and here {'is one' if there else 'are none'}")
        abroad = [one.host for one in wanted if one.host]
        if abroad and self.settings.is_local:
            raise Unfit(f"host = \"{abroad[0]}\" is a machine of a Ray cluster: write address = \"auto\" beside workers, or "
                        "the address of the cluster's head, such as \"192.168.1.2:6379\"")
        free = iter([device for device in there if device not in {one.device for one in wanted if not one.host}])
        found = [replace(one, device=one.device or next(free, "" if there else "cpu")) for one in wanted]
        # What another host has, only a worker there can tell.
        missing = {one.device for one in found if not one.host and one.device != "cpu" and one.device not in there}
        if missing:
            named = ", ".join(sorted(missing - {""})) or f"{len(found)} workers"
            raise Unfit(f"{named} cannot be had: the devices here are {', '.join(there) or 'the CPU alone'}")
        return found

    def decide(self, request: Request) -> Decision | None:
        rule: Any = self._rules.get(type(request))
        return rule(request) if rule and not self._crew.broken else None

    def prompt_ended(self) -> None:
        if self._started and self._dispatcher.prompt_ended():
            self._crew.report()

    def emptied(self) -> None:
        if self._started:
            self._crew.tell("release")

    def close(self) -> None:
        if self._started:
            self._crew.close()

    def _build(self, request: BuildModel) -> Decision | None:
        self._crew.wake()
        return None

    def _place(self, request: PlaceModel) -> Decision | None:
        if request.remote is None or request.remote.module in self._left:
            return None
        return Decision("its weights stay where they are; the workers compute with it", partial(self._stay, request))

    def _stay(self, request: PlaceModel, proceed: Proceed) -> Any:
        assert request.remote is not None
        if self._freighter.of(request.remote) is None:
            self._pack(request, request.remote)
        elif request.weights.on_device() and request.device.type != "cpu":
            request.weights.give_back(request.weights.on_device())  # it was computed here for once
        return proceed(replace(request, more_bytes=0.0, elsewhere=True))

    def _pack(self, request: PlaceModel, remote: Remote) -> None:
        self._crew.ready()  # not inside: the host's Cancel says nothing of the model
        request.weights.take_off()
        try:
            self._freighter.pack(remote)
        except BaseException:
            self._left.add(remote.module)
            raise

    def _step(self, request: SampleStep) -> Decision | None:
        if request.remote is None or self._freighter.of(request.remote) is None:
            return None
        count = len(request.branches())
        enough = count > 1 and (count >= self._count or not self.settings.together)  # else all of them compute each
        return Decision("", partial(self._apart, request)) if enough and self.settings.rows else None

    def _apart(self, request: SampleStep, proceed: Proceed) -> Any:
        from .branches import side_by_side

        assert request.remote is not None
        together = (len(request.branches()) * request.x.shape[0], *request.x.shape[1:])
        if self.settings.weights not in WHOLE and self._dispatcher.shares_weights(request.remote, together):
            return proceed(request)
        return proceed(replace(request, run=lambda: side_by_side(request.branches())))  # anew where the step is repeated

    def _predict(self, request: Predict) -> Decision | None:
        return None if self._freighter.of(request.remote) is None else Decision("", partial(self._dispatcher.act, request))

    def _scale(self, request: ScaleTiles) -> Decision | None:
        return Decision("", partial(self._tiler.act, request))

    def _room(self, request: BatchRoom) -> Decision | None:
        return Decision("", self._free) if request.module in self._freighter else None

    def _free(self, proceed: Proceed) -> Any:
        """What the fullest device has."""
        free = [worker.about["free_bytes"] for worker in self._crew.ready()]
        return min(free) if free else proceed()

    def _release(self, request: ReleaseModel) -> Decision | None:
        if request.bytes_wanted != 0 and request.weights.module in self._freighter:
            self._crew.tell("release", self._freighter.key(request.weights.module))
        return None
