"""A worker, as the host's process sees it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from .memo import Sent


class Lost(Exception):
    """Workers are dead, or do not answer."""

    def __init__(self, workers: Sequence[Worker], why: str) -> None:
        super().__init__(why)
        self.workers = tuple(workers)


class Failed(Exception):
    """What was asked raised an error in the worker, which lives on."""


@dataclass(eq=False)
class Worker:
    """
    Attributes:
        device: as torch calls it in the host, or on the worker's own.
        weight: its share of the work, beside the others'.
        host: another one of the cluster, by its address; "" is ComfyUI's own machine.
        handle: Ray's.
        about: what it told of itself last.
        sent: what it knows of conditionings.
        models: that it has, and the digest of what is patched in each.
    """

    rank: int
    device: str
    weight: float
    handle: Any = None
    host: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    sent: Sent = field(default_factory=Sent)
    models: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Device and host, for people."""
        return f"{self.device} of {self.host}" if self.host else self.device

    def ask(self, what: str, *arguments: Any) -> Any:
        """Asks the program, after what it was asked before; a reference to its answer."""
        return self.handle.ask.remote(what, *arguments)

    def tell(self, what: str, *arguments: Any) -> Any:
        """The same, beside what it is computing."""
        return self.handle.tell.options(concurrency_group="beside").remote(what, *arguments)

    def forget(self) -> None:
        """Another process takes its place, and knows nothing."""
        self.models.clear()
        self.sent = Sent()


def answer_of(worker: Worker, reference: Any, seconds: float | None = None) -> Any:
    """
    Raises:
        Lost: the worker is dead.
        Failed: what it was asked raised an error, the answer was lost on its way, or did not come in time.
    """
    where = f"worker {worker.rank} on {worker.place}"
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayActorError as error:
        raise Lost([worker], f"{where} is dead") from error
    except ray.exceptions.RayError as error:
        raise Failed(f"{where}: {in_a_line(error)}") from error


def is_dead(reference: Any) -> bool:
    """Whether the worker died of what it was asked, or before."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.RayActorError:
        return True
    except ray.exceptions.RayError:  # it raised an error, or is at it still
        return False
    return False


def in_a_line(error: BaseException) -> str:
    """Kind and words of an error; of one that a worker raised, without Ray's and without the traceback."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None else error
    return f"{type(cause).__name__}: {''.join(str(cause).strip().splitlines()[-1:])}"
