"""All workers together: started in the background, asked side by side, replaced when they are lost."""
from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from ...telemetry import emit, log
from . import cluster, launching
from .settings import Settings, WorkerSettings
from .workers import Lost, Worker, answer_of, in_a_line, is_dead

_POLL = 0.05  # seconds between two looks at the user's Cancel
_GRACE = 10.0  # seconds that a cancelled worker has to end its step
_HELD = ("private_bytes", "shared_bytes", "free_bytes")


class Crew:
    """All workers.

    Args:
        devices: one for each worker, as torch calls it here.
        twin: `policies.host.Process.twin`.
        raise_if_cancelled: the host's, asked while somebody waits.

    Attributes:
        broken: why there are no workers, and will be none.
        grouped: whether they exchange tensors among each other.
    """

    def __init__(self, settings: Settings, devices: Sequence[WorkerSettings], twin: Callable[[], dict[str, Any]],
                 raise_if_cancelled: Callable[[], None]) -> None:
        self._settings, self._twin, self._raise_if_cancelled = settings, twin, raise_if_cancelled
        self._devices = devices
        self._workers: list[Worker] = []
        self._changing = 0  # so much is to be done until all workers are there and idle
        self._changed = threading.Condition()
        self._work: queue.SimpleQueue[tuple[bool, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._connected = self.grouped = False
        self.broken = ""

    def wake(self) -> None:
        """Starts the workers in the background, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="residency-ray", daemon=True)
            self._change(self._start)
            self._thread.start()

    def ready(self) -> Sequence[Worker]:
        """The workers, as soon as they are ready; none if they cannot be had, and why is in `broken`.

        Raises:
            BaseException: the host's Cancel.
        """
        self.wake()
        waiting, told = time.monotonic(), False
        while not self.broken and not self._is_steady():
            self._raise_if_cancelled()
            if not told and time.monotonic() - waiting > 2:
                told = True
                log.info("[residency] waiting for %d workers to be ready", len(self._devices))
        return () if self.broken else self._workers

    def gather(self, asked: Mapping[Worker, Any], seconds: float, check: Callable[[], None] = lambda: None) -> list[Any]:
        """The answers of several workers, in order.

        Raises:
            Lost: one is dead, or does not answer in so many seconds.
            Failed: one raised an error.
            BaseException: the host's Cancel, or what `check` raises; the workers are told of it.
        """
        end = time.monotonic() + seconds
        by_reference = {reference: worker for worker, reference in asked.items()}
        pending, answers = list(by_reference), dict[Any, Any]()
        try:
            while pending:
                found, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL)
                answers.update({reference: answer_of(by_reference[reference], reference) for reference in found})
                self._raise_if_cancelled()
                check()
                if pending and time.monotonic() > end:
                    raise Lost([by_reference[one] for one in pending], f"no answer in {seconds:.0f} s")
        except BaseException as error:
            gone = error.workers if isinstance(error, Lost) else ()  # whoever hears of it replaces these
            left = {worker: one for worker, one in asked.items() if one not in answers and worker not in gone}
            self._change(partial(self._call_off, left, regroup=not gone))
            raise
        return [answers[reference] for reference in asked.values()]

    def any(self, asked: Mapping[Any, Worker], seconds: float) -> list[Any]:
        """Those references that are answered, as soon as there is one.

        Raises:
            Lost: nobody answers in so many seconds.
            BaseException: the host's Cancel; the workers are not told of it.
        """
        end = time.monotonic() + seconds
        while not (found := ray.wait(list(asked), num_returns=1, timeout=_POLL)[0]):
            self._raise_if_cancelled()
            if time.monotonic() > end:
                raise Lost(list(dict.fromkeys(asked.values())), f"no answer in {seconds:.0f} s")
        self._raise_if_cancelled()
        return list(found)

    def call_off(self, asked: Mapping[Worker, Any]) -> None:
        """Tells workers that what they were asked last is not wanted any more."""
        self._change(partial(self._call_off, asked, regroup=True))

    def lose(self, workers: Sequence[Worker], why: str) -> None:
        """Replaces workers, in the background."""
        self._lose(dict.fromkeys(workers, why))

    def _lose(self, why: Mapping[Worker, str]) -> None:
        for worker, reason in why.items():
            emit("worker.lost", worker=worker.rank, device=worker.place, reason=reason)
        self._change(partial(self._replace, list(why)))

    def tell(self, what: str, *arguments: Any) -> None:
        """Tells all workers something, in the background, as soon as it is their turn."""
        if self._thread is not None:
            self._work.put((False, partial(self._tell, what, arguments)))

    def report(self) -> None:
        """Has telemetry told what the workers hold, in the background."""
        if self._thread is not None:
            self._work.put((False, self._report))

    def close(self) -> None:
        """Ends the workers, and Ray if it was started here."""
        if self._thread is not None and self._thread.is_alive():
            self.broken = self.broken or "the policy was turned off"
            self._change(self._stop)
            self._work.put(None)
            self._thread.join(_GRACE)

    def _is_steady(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._changing, _POLL)

    def _change(self, work: Callable[[], None]) -> None:
        """Does something in the background that others wait for."""
        with self._changed:
            self._changing += 1
        self._work.put((True, work))

    def _run(self) -> None:
        # Ray's processes end with this thread, so it goes on as long as the policy does.
        while (item := self._work.get()) is not None:
            changes, work = item
            try:
                work()
            except Exception as error:
                log.debug("workers failed", exc_info=error)
                if changes and not self.broken:
                    self.broken = in_a_line(error)
                    emit("shard.broken", reason=self.broken)
                    self._work.put((False, self._stop))  # nobody asks those that are left
            with self._changed:
                self._changing -= changes
                self._changed.notify_all()

    def _start(self) -> None:
        started = time.perf_counter()
        namespace = "residency" if self._settings.detached else f"residency-{os.getpid()}"
        self._connected = cluster.connect(self._settings, namespace)
        hosts = cluster.others(one.host for one in self._devices)
        self._workers = [Worker(rank, one.device, one.weight, host=hosts[one.host]) for rank, one in enumerate(self._devices)]
        self._spawn(self._workers)
        emit("shard.started", workers=[worker.place for worker in self._workers], grouped=self.grouped,
             seconds=time.perf_counter() - started)

    def _spawn(self, workers: Sequence[Worker]) -> None:
        launching.launch(self._settings, self._twin(), self._workers, workers)
        self._group()

    def _group(self) -> None:
        """The workers meet; where they cannot, each goes on by itself."""
        self.grouped = False
        if not self._settings.meets or len(self._workers) < 2:
            return
        try:
            launching.meet(self._settings, self._workers)
            self.grouped = True
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            emit("shard.demoted", model="all", way="together", reason=f"the workers did not meet: {in_a_line(error)}")

    def _replace(self, workers: Sequence[Worker]) -> None:
        if self.broken:
            return
        started = time.perf_counter()
        for worker in workers:
            ray.kill(worker.handle)
            worker.forget()
        self._spawn(workers)
        for worker in workers:
            emit("worker.replaced", worker=worker.rank, device=worker.place, seconds=time.perf_counter() - started)

    def _call_off(self, asked: Mapping[Worker, Any], regroup: bool) -> None:
        """Lets cancelled workers end their step; who does not is replaced. They meet again, if they will not anyway."""
        if self.broken or not asked:
            return
        telling = [worker.tell("cancel", True) for worker in asked]
        ray.wait(telling, num_returns=len(telling), timeout=1)
        late = _late(asked)
        late |= _late({worker: worker.tell("cancel", False) for worker in asked if worker not in late})
        if late:
            self._lose(late)
        elif self.grouped and regroup:
            self._group()

    def _tell(self, what: str, arguments: Sequence[Any]) -> None:
        ray.wait([worker.ask(what, *arguments) for worker in self._workers], num_returns=len(self._workers), timeout=_GRACE)

    def _report(self) -> None:
        about = ray.get([worker.tell("about") for worker in self._workers], timeout=_GRACE)
        emit("shard.workers", **{name: {f"worker {rank}": one[name] for rank, one in enumerate(about)} for name in _HELD})

    def _stop(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            if worker.handle is not None and not self._settings.detached:
                ray.kill(worker.handle)
        if self._connected:
            cluster.disconnect()


def _late(asked: Mapping[Worker, Any]) -> dict[Worker, str]:
    """Those who do not answer soon, and why."""
    _, stuck = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_GRACE)
    return {worker: "it did not end its step" if reference in stuck else "it is dead"
            for worker, reference in asked.items() if reference in stuck or is_dead(reference)}
