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
        device: as torch calls it in the host.
        weight: its share of the work, beside the others'.
        handle: Ray's.
        about: what it told of itself last.
        sent: what it knows of conditionings.
        models: that it has, and the digest of what is patched in each.
    """

    rank: int
    device: str
    weight: float
    handle: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    sent: Sent = field(default_factory=Sent)
    models: dict[str, str] = field(default_factory=dict)

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


def raise_if_failed(worker: Worker, reference: Any) -> None:
    """
    Raises:
        Lost: the worker is dead.
        Failed: what it was asked raised an error.
    """
    try:
        ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise Lost([worker], f"worker {worker.rank} on {worker.device} is dead") from error
    except ray.exceptions.RayTaskError as error:
        raise Failed(f"worker {worker.rank} on {worker.device}: {type(error.cause).__name__}: {error.cause}") from error


def is_dead(reference: Any) -> bool:
    """Whether the worker died of what it was asked, or before."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.RayActorError:
        return True
    except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
        return False
    return False
